"""A trained connector by itself: its weights, what it was trained between, and the way back to a whole model."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from anchorformer.assemble import assemble
from anchorformer.errors import UserError, run_guarded
from anchorformer.export import CARD, base_digest, cast, refuse_existing
from anchorformer.hub import load, read_object
from anchorformer.model_folder import derive_folder, make_durable, partial_of, read_index, sha256
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.schema import Schema, parse
from anchorformer.weights import check_folder

log = logging.getLogger(__name__)

DESCRIPTION = "connector.json"
WEIGHTS = "connector.safetensors"
BASES = ("vision_tower", "language_model")


@dataclass(frozen=True, kw_only=True)
class Description(Schema):
    """What connector.json holds."""

    selector: dict[str, Any]
    connector: dict[str, Any]
    tiling: dict[str, Any]
    template: str
    bases: dict[str, dict[str, str]]
    """Part -> name (hub id or folder) and sha256 of its tensors (`anchorformer.export.base_digest`)."""
    weights_sha256: str
    integration: dict[str, Any] | None = None
    """Its weights lie beside the connector's."""


def export_connector(folder: Path, out: Path, dtype: torch.dtype, names: dict[str, str], card: str) -> Path:
    """The connector of a model folder, and which vision tower and language model it belongs between.

    An integration, where the model has one, goes with it.

    About 170 MB at the paper's size in bf16, where a whole model has 14 GB.

    Args:
        names: part -> the name that the base is found under, for both parts of `BASES`.
        card: Markdown, written as README.md.

    Raises:
        UserError: the folder is damaged, or there is something at `out` already.
    """
    refuse_existing(out)
    config = check_folder(folder)
    processor = load("processor", folder, AnchorFormerProcessor.from_pretrained)
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted({file for key, file in read_index(folder).items() if key.partition(".")[0] not in BASES}):
        tensors |= {key: cast(value, dtype) for key, value in load_file(folder / name).items()}
    partial = partial_of(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
    bases = {
        part: {"name": names[part], "sha256": base_digest(folder, part)}
        for part in tqdm(BASES, "hashing the bases", delay=5, leave=False)
    }
    description = {
        "selector": config.selector, "connector": config.connector, "tiling": config.tiling,
        "integration": config.integration, "template": processor.template, "bases": bases,
        "weights_sha256": sha256(partial / WEIGHTS),
    }  # fmt: skip
    (partial / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    (partial / CARD).write_text(card, encoding="utf-8")
    make_durable(partial)
    partial.rename(out)
    return out


def attach(folder: Path, out: Path, vision: str | None = None, language_model: str | None = None) -> Path:
    """The whole model of a connector folder: its bases fetched and compared by hash, its weights between them.

    Args:
        vision, language_model: where the bases are found, if not under the names that the folder holds.

    Raises:
        UserError: a damaged folder, or another base than the connector was trained with.
    """
    refuse_existing(out)
    description = read_description(folder)
    names = {
        part: given or description.bases[part]["name"]
        for part, given in zip(BASES, (vision, language_model), strict=True)
    }
    fresh = partial_of(out.with_name(f"{out.name}-bases"))
    try:
        assemble(
            names["vision_tower"], names["language_model"], description.selector, description.connector, fresh,
            template=description.template, tiling=description.tiling, integration=description.integration,
        )  # fmt: skip
        for part in BASES:
            found, wanted = base_digest(fresh, part), description.bases[part]["sha256"]
            if found != wanted:
                raise UserError(
                    f"the connector was trained with another {part.replace('_', ' ')}",
                    found=f"{names[part]} with sha256 {found[:16]}...",
                    expected=f"{description.bases[part]['name']} with sha256 {wanted[:16]}...",
                    remedy="name the base that it was trained with: --vision or --language-model",
                )
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, value in load_file(folder / WEIGHTS).items():
            parts.setdefault(name.partition(".")[0], {})[name] = value
        derive_folder(fresh, parts, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    log.info("model folder %s", out)
    return out


def read_description(folder: Path) -> Description:
    """What a connector folder says of itself, its weights compared with their hash.

    Raises:
        UserError: it is none, or its weights are damaged.
    """
    path = folder / DESCRIPTION
    remedy = "pass a folder written by `python -m train export RUN OUT what=connector`"
    if not path.is_file():
        raise UserError(
            f"{folder} is no connector folder", found=f"no {DESCRIPTION}", expected=DESCRIPTION, remedy=remedy
        )
    description = parse(Description, read_object(path), str(path), remedy)
    found = sha256(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else "no file"
    if found != description.weights_sha256:
        raise UserError(
            f"{folder / WEIGHTS} is damaged", found=found, expected=description.weights_sha256,
            remedy="fetch the file again",
        )  # fmt: skip
    return description


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m anchorformer.connector_folder", description=__doc__)
    parser.add_argument(
        "connector", type=Path, help="folder written by `python -m train export RUN OUT what=connector`"
    )
    parser.add_argument("out", type=Path, help="model folder to be written")
    parser.add_argument(
        "--vision", help="hub id or folder of the vision tower, if not where the connector's folder says"
    )
    parser.add_argument("--language-model", help="the same of the language model")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    attach(options.connector, options.out, options.vision, options.language_model)


if __name__ == "__main__":
    run_guarded(main)
