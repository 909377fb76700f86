"""Opening as many records as LLaVA-665k has: seconds after the first time, and the private memory of a worker."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorformer.schema import parse
from bench.lengths import real
from bench.runner import Row, Size, in_fresh_process, resident
from data.config import DataConfig
from data.mixture import Mixture

if TYPE_CHECKING:
    from PIL import Image

    from anchorformer.contracts import Example

COUNT = 665_298
"""Records of LLaVA-665k."""
GOALS = (5.0, 200.0)
"""Most seconds, and most megabytes."""
CHARACTERS_PER_TOKEN = 4


def rows(size: Size) -> Iterator[Row]:
    if size is not Size.full:
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        megabytes = write(root, COUNT) / 1e6
        begun = time.monotonic()
        Mixture(_config(root), WordCounter())
        first = time.monotonic() - begun
        opened = in_fresh_process(_open, root)
    where = f"{COUNT:,} records of a {megabytes:.0f} MB file, opened again"
    note = (
        f"a new process, everything on disk; the first time took {first:.0f} s (wall, words counted, not tokens); "
        "equal: all records are there"
    )
    equal = opened.count == COUNT
    yield Row(name=f"{where}: time", unit="s", new=opened.seconds, equal=equal, goal=GOALS[0], note=note)
    yield Row(
        name=f"{where}: private memory", unit="MB", new=opened.private / 1e6, equal=equal, goal=GOALS[1],
        note=f"after {READ:,} records were read too; the mapped table is shared by all workers",
    )  # fmt: skip


READ = 5_000


@dataclass(frozen=True)
class _Opened:
    count: int
    seconds: float
    private: int


def _open(root: Path) -> _Opened:
    before, begun = resident("RssAnon"), time.process_time()
    mixture = Mixture(_config(root), WordCounter())
    seconds = time.process_time() - begun
    numbers = random.Random(0)
    for _ in range(READ):
        mixture[numbers.randrange(len(mixture))]
    return _Opened(len(mixture), seconds, resident("RssAnon") - before)


def write(root: Path, count: int) -> int:
    """A file in LLaVA's format with the lengths of real records, in four turns each; returns its bytes."""
    lengths = real()
    text = "".join(random.Random(0).choices("etaoin shrdlu ", k=1 << 14))
    turns = ("human", "gpt", "human", "gpt")
    with (root / "records.json").open("w") as file:
        for number in range(count):
            sample = number % len(lengths.text)
            part = text[: lengths.text[sample] * CHARACTERS_PER_TOKEN // len(turns)]
            said: list[dict[str, str]] = [{"from": role, "value": part} for role in turns]
            record: dict[str, Any] = {"id": f"{number:09}", "conversations": said}
            if lengths.images[sample]:
                record["image"] = f"coco/train2017/{number:012}.jpg"
                said[0] = {"from": "human", "value": "<image>\n" + part}
            file.write(("," if number else "[") + json.dumps(record) + "\n")
        file.write("]")
    return (root / "records.json").stat().st_size


def _config(root: Path) -> DataConfig:
    source = {"_target_": "data.sources.llava.LlavaConfig", "annotations": "records.json"}
    values = {"root": str(root), "sources": {"large": source}, "cache_dir": str(root / "cache"), "overlength": "drop"}
    return parse(DataConfig, values, "bench")


class WordCounter:
    """Stands for a processor where only the records are measured: a word is a token."""

    needs_sizes = needs_token_counts = False

    def encode(
        self, turns: Sequence[tuple[str, str]], images: Sequence[Image.Image], *, sample_id: str,
        max_length: int | None = None, overlength: str = "error", token_counts: Sequence[Sequence[int]] | None = None,
    ) -> Example:  # fmt: skip
        raise NotImplementedError("nothing is encoded here")

    def measure(
        self, turns: Sequence[tuple[str, str]], num_images: int, *, sizes: Sequence[tuple[int, int] | None] = (),
        sample_id: str = "record", max_length: int | None = None, overlength: str = "error",
        token_counts: Sequence[Sequence[int]] | None = None,
    ) -> tuple[int, int]:  # fmt: skip
        said = {role: 1 + sum(text.count(" ") for who, text in turns if who == role) for role in ("user", "assistant")}
        return sum(said.values()), said["assistant"]

    def save_pretrained(self, save_directory: str) -> None:
        """Has nothing to save."""
