"""A trained model as a folder to hand on: in the precision it is served in, with a model card."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.errors import UserError
from anchorformer.hub import INDEX
from anchorformer.model_folder import MANIFEST, make_durable, partial_of, read_index, write_manifest
from anchorformer.weights import check_folder

CARD = "README.md"
"""What model hubs show as a model's page."""
CONFIG = "config.json"


def export_model(folder: Path, out: Path, dtype: torch.dtype, card: str) -> Path:
    """A copy of a model folder with its weights in `dtype` and a model card; it appears only when complete.

    Shards are read and written one after the other, so that no more than one is in memory.

    Args:
        card: Markdown, written as README.md.

    Raises:
        UserError: the folder is damaged, or there is something at `out` already.
    """
    refuse_existing(out)
    check_folder(folder, every_hash=True)
    partial = partial_of(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = set(read_index(folder).values())
    total = 0
    for name in tqdm(sorted(shards), f"exporting {folder.name}", delay=5, leave=False):
        tensors = {key: cast(value, dtype) for key, value in load_file(folder / name).items()}
        total += sum(value.numel() * value.element_size() for value in tensors.values())
        save_file(tensors, partial / name, metadata={"format": "pt"})
    for path in folder.iterdir():
        if path.name not in {*shards, MANIFEST, INDEX}:
            shutil.copy2(path, partial / path.name)
    index = json.loads((folder / INDEX).read_bytes()) | {"metadata": {"total_size": total}}
    (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    config = AnchorFormerConfig.from_pretrained(folder)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.save_pretrained(partial)
    (partial / CARD).write_text(card, encoding="utf-8")
    write_manifest(partial)
    make_durable(partial)
    partial.rename(out)
    return out


def refuse_existing(out: Path) -> None:
    """
    Raises:
        UserError: there is something at `out`.
    """
    if out.exists():
        raise UserError(
            f"{out} exists already", found="a folder" if out.is_dir() else "a file", expected="a path that is free",
            remedy="choose another one, or remove it",
        )  # fmt: skip


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in `dtype`; whole numbers and masks as they are."""
    return value.to(dtype) if value.is_floating_point() else value


def base_digest(folder: Path, part: str) -> str:
    """A hash of one part's tensors: names, types, shapes and bits, however they are divided into files.

    Rows of the vocabulary behind the image token's, that one included, are not published with a language model but
    added when a folder is assembled, and do not count.
    """
    config = AnchorFormerConfig.from_pretrained(folder)
    added, vocabulary = config.image_token_id, config.text_config.vocab_size
    digest = hashlib.sha256()
    for name, value in _tensors_of(folder, part):
        if part == "language_model" and value.shape[0] == vocabulary:
            value = value[:added]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors_of(folder: Path, part: str) -> Iterator[tuple[str, Tensor]]:
    index = read_index(folder)
    for name in sorted(key for key in index if key.startswith(f"{part}.")):
        with safe_open(folder / index[name], framework="pt") as file:
            yield name, file.get_tensor(name)
