"""A finished copy on this disk, compared file by file with its manifest."""

from __future__ import annotations

import json
from pathlib import Path

from tqdm import tqdm

from anchorformer.errors import UserError
from anchorformer.schema import parse
from data.shards.layout import IMAGES, MANIFEST, RECORDS, FileFacts, Manifest, shard_name
from data.shards.shard import facts_of


def read_manifest(out: Path) -> Manifest:
    """The manifest of a finished copy on this disk."""
    return parse(Manifest, json.loads((out / MANIFEST).read_text()), str(out / MANIFEST), "write the copy again")


def verify(out: Path) -> None:
    """Reads every file of a finished copy and compares it with the manifest.

    Raises:
        UserError: no manifest, a file that is missing, or one with another content.
    """
    if not (out / MANIFEST).is_file():
        raise UserError(
            f"{out} holds no finished copy", found=f"no {MANIFEST}", expected="a finished one",
            remedy="write it: the same command without verify",
        )  # fmt: skip
    expected: dict[str, FileFacts] = {}
    for name, facts in read_manifest(out).sources.items():
        expected |= {f"{name}/{RECORDS}": facts.records, f"{name}/{IMAGES}": facts.images}
        expected |= {f"{name}/{shard_name(number)}": shard for number, shard in enumerate(facts.shards)}
    total = sum(facts.bytes for facts in expected.values())
    with tqdm(desc="comparing", total=total, unit="B", unit_scale=True, delay=2, mininterval=0.5) as progress:
        for name, written in expected.items():
            found = facts_of(out / name) if (out / name).is_file() else None
            if found is None or (found.bytes, found.sha256) != (written.bytes, written.sha256):
                raise UserError(
                    f"{out / name} is not what was written",
                    found="nothing" if found is None else f"{found.bytes} bytes with sha256 {found.sha256}",
                    expected=f"{written.bytes} bytes with sha256 {written.sha256}", remedy="copy that file again",
                )  # fmt: skip
            progress.update(written.bytes)
