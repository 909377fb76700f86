"""How a model folder lies on disk: one shard or more per part, an index, and a manifest with a hash of every file.

A model folder is an ordinary Hugging Face folder whose shards never mix parts: `connector.safetensors`,
`vision_tower-00001.safetensors`, `language_model-00001.safetensors`, ..., an index, and MANIFEST.json with the size and
sha256 of every file. That makes the hand-over between stages cheap: a new folder links the shards it did not change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from anchorformer.errors import UserError
from anchorformer.hub import INDEX, read_mapping, read_weight_map
from anchorformer.processing import AnchorFormerProcessor

MANIFEST = "MANIFEST.json"
PARTS = ("vision_tower", "connector", "integration", "language_model")
SHARD_BYTES = 4 * 2**30
"""Largest shard: a part is split where one more tensor would exceed it."""


def write_parts(folder: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes the shards of all parts, their index and the manifest into a folder that holds the other files already.

    Args:
        parts: part -> tensors under their full names in the model's state dict; no two may share memory. A part without
            any gets no file.
    """
    weight_map: dict[str, str] = {}
    for part, tensors in parts.items():
        weight_map |= _write_shards(folder, part, tensors)
    _write_index(folder, weight_map)
    write_manifest(folder)


def derive_folder(
    base: Path, replaced: Mapping[str, Mapping[str, Tensor]], out: Path, processor: AnchorFormerProcessor | None = None
) -> Path:
    """A new model folder like `base` with the tensors of some parts replaced; unchanged files are linked, not copied.

    The folder appears under its name only when it is complete, and then stays there through a power cut.

    Args:
        replaced: part -> every tensor of that part, under its full name.
        processor: written instead of the base's, for a stage with a conversation template of its own; answers of the
            new folder end where that template ends them.

    Raises:
        UserError: the names or shapes of a replaced part differ from the base's.
        OSError, safetensors.SafetensorError: the disk does not take it; nothing of it is left.
    """
    base_map = read_index(base)
    for part, tensors in replaced.items():
        compare_shapes(f"{part} to be written to {out}", {k: tuple(v.shape) for k, v in tensors.items()},
                 {k: v for k, v in read_shapes(base).items() if k.startswith(part + ".")})  # fmt: skip
    stale = {name for key, name in base_map.items() if key.split(".", 1)[0] in replaced}
    known = read_manifest(base)
    partial = partial_of(out)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_derived(partial, base, replaced, stale, base_map, known, processor)
    except (OSError, SafetensorError):
        shutil.rmtree(partial, ignore_errors=True)  # a full disk is not made fuller
        raise
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    _sync(out.parent)
    return out


def partial_of(out: Path) -> Path:
    """What a folder is called as long as `derive_folder` writes it."""
    return out.with_name(f".tmp-{out.name}")


def bytes_copied(base: Path, replaced: Collection[str], place: Path) -> int:
    """Bytes of shards that `derive_folder` has to copy below `place`: 0 where the two lie on one disk that has links.

    Args:
        replaced: parts whose shards are written anew and are not counted.
    """
    kept = {name for key, name in read_index(base).items() if key.split(".", 1)[0] not in replaced}
    if not kept:
        return 0
    probe = place / f".probe-{os.getpid()}"
    try:
        os.link(base / min(kept), probe)
    except OSError:
        manifest = read_manifest(base)
        return sum(manifest[name]["bytes"] for name in kept)
    probe.unlink()
    return 0


def part_state(model: torch.nn.Module, part: str, tied: Collection[str] | None = None) -> dict[str, Tensor]:
    """Tensors of one part of a whole (not sharded) model under their full names.

    Args:
        tied: names that are aliases of others and are left out; those the model itself names where none are given.
    """
    aliases: Collection[str] = model.all_tied_weights_keys if tied is None else tied  # type: ignore[assignment]
    return {k: v for k, v in model.state_dict().items() if k.startswith(part + ".") and k not in aliases}


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, read from the shards' headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(read_index(folder).values())):
        shapes |= read_header(folder / name)
    return shapes


def read_header(shard: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of one safetensors file.

    Raises:
        UserError: it is not one.
    """
    try:
        with safe_open(shard, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{shard} cannot be read", found=error, expected="a safetensors file",
            remedy="restore the file or write the folder again; a clone without git-lfs holds pointers",
        ) from None  # fmt: skip


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file name."""
    check_present(folder / INDEX)
    return read_weight_map(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """File name -> its `bytes` and `sha256`."""
    check_present(folder / MANIFEST)
    return read_mapping(folder / MANIFEST, "files")


def write_manifest(folder: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Writes MANIFEST.json over all files of the folder; entries in `known` are not hashed again."""
    files = {}
    paths = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    for path in tqdm(paths, "hashing files", delay=5, leave=False):
        entry = (known or {}).get(path.name)
        files[path.name] = dict(entry or {"bytes": path.stat().st_size, "sha256": sha256(path)})
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=2) + "\n")


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare_shapes(what: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """
    Raises:
        UserError: names or shapes that differ; the first few of each kind are named.
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & found.keys() if found[name] != expected[name])
    if missing or extra or other:
        raise UserError(
            f"tensors of {what} do not fit the model",
            found="; ".join(
                [f"missing {name}" for name in missing[:3]]
                + [f"unknown {name}" for name in extra[:3]]
                + [f"{name} of shape {found[name]}" for name in other[:3]]
            ) + f" ({len(missing)} missing, {len(extra)} unknown, {len(other)} of another shape)",
            expected="; ".join(f"{name} {expected[name]}" for name in (missing + other)[:3]) or "no unknown tensors",
            remedy="start from a folder that was written for this selector and connector",
        )  # fmt: skip


def check_present(path: Path) -> None:
    """
    Raises:
        UserError: a model folder without this file.
    """
    if not path.is_file():
        raise UserError(
            f"{path.parent} is not a model folder", found=f"no {path.name}",
            expected="a folder written by anchorformer.assemble or by a finished run",
            remedy="pass a run (checkpoints/<run>) that is done, or assemble the model first",
        )  # fmt: skip


def make_durable(folder: Path) -> None:
    """Keeps everything in a folder through a power cut; call it before the folder gets its name."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _write_derived(
    partial: Path, base: Path, replaced: Mapping[str, Mapping[str, Tensor]], stale: Collection[str],
    base_map: Mapping[str, str], known: Mapping[str, Any], processor: AnchorFormerProcessor | None,
) -> None:  # fmt: skip
    partial.mkdir(parents=True)
    if processor is not None:
        processor.save_pretrained(partial)
        generation = GenerationConfig.from_pretrained(base, local_files_only=True)
        generation.update(eos_token_id=processor.stop_token_ids)
        generation.save_pretrained(partial)
    linked = [name for name in known if name not in {*stale, INDEX} and not (partial / name).exists()]
    for name in linked:
        # Only shards are linked, which nobody edits by hand; a change to a linked config would change its siblings'.
        (_link if name.endswith(".safetensors") else shutil.copy2)(base / name, partial / name)
    weight_map = {key: name for key, name in base_map.items() if name not in stale}
    for part, tensors in replaced.items():
        weight_map |= _write_shards(partial, part, tensors)
    _write_index(partial, weight_map)
    write_manifest(partial, known={name: known[name] for name in linked})
    make_durable(partial)


def _write_shards(folder: Path, part: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    shards: list[dict[str, Tensor]] = [{}] if tensors else []
    size = 0
    for name in sorted(tensors):
        if not name.startswith(part + "."):
            raise ValueError(f"tensor {name} does not belong to part {part}")
        bytes_ = tensors[name].numel() * tensors[name].element_size()
        if shards[-1] and size + bytes_ > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name].detach().cpu().contiguous()
        size += bytes_
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(tqdm(shards, f"writing {part}", delay=5, leave=False), 1):
        file = f"{part}.safetensors" if len(shards) == 1 else f"{part}-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    return weight_map


def _write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    total = sum((folder / name).stat().st_size for name in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _sync(path: Path) -> None:
    """Makes the contents of a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
