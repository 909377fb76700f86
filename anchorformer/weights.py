"""A model folder checked by name, shape and hash before any weight is loaded, and then loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.errors import UserError
from anchorformer.hub import CONFIG, check_files, read_object
from anchorformer.model_folder import check_present, compare_shapes, read_index, read_manifest, read_shapes, sha256
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.parts import parse_integration, parse_parts, parse_tiling
from anchorformer.schema import plugin_to_plain, to_plain
from anchorformer.tiling import Tiling
from anchorformer.vision import VisionTower


def check_folder(
    folder: Path,
    selector: Mapping[str, Any] | None = None,
    connector: Mapping[str, Any] | None = None,
    *,
    tiling: Tiling | None = None,
    integration: Mapping[str, Any] | None = None,
    every_hash: bool = False,
) -> AnchorFormerConfig:
    """Everything that can be wrong with a model folder, found from headers and hashes before a weight is loaded.

    Compares file sizes with the manifest, the sha256 of the connector's and the integration's shards, selector,
    connector, integration and tiling with those the run asks for, and the names and shapes of all tensors with the
    model that the configuration describes; and validates the generation config.

    Args:
        integration: that of the run, or None for none; compared where a selector is given.
        every_hash: also read the backbones' shards (some 14 GB at 7B) to compare their sha256; once per run is enough.

    Raises:
        UserError: naming the file, key or tensor that differs.
    """
    manifest = read_manifest(folder)
    for name, entry in tqdm(manifest.items(), f"checking {folder.name}", delay=5, leave=False):
        path = folder / name
        found = path.stat().st_size if path.is_file() else "no file"
        if found != entry["bytes"]:
            raise UserError(
                f"model folder {folder} is damaged at {name}", found=f"{found} bytes",
                expected=f"{entry['bytes']} bytes", remedy="restore the file or write the folder again",
            )  # fmt: skip
        if (every_hash or name.startswith(("connector", "integration"))) and sha256(path) != entry["sha256"]:
            raise UserError(
                f"model folder {folder} is damaged at {name}", found="another sha256 than the manifest's",
                expected=entry["sha256"], remedy="restore the file or write the folder again",
            )  # fmt: skip
    check_files(folder)
    _check_type(folder)
    _check_generation(folder)
    config = AnchorFormerConfig.from_pretrained(folder)
    wanted_parts = parse_parts(selector or config.selector, connector or config.connector)
    parts = parse_parts(config.selector, config.connector)
    for kind, wanted_part, part in zip(("selector", "connector"), wanted_parts, parts, strict=True):
        if wanted_part != part:
            wanted, has = plugin_to_plain(wanted_part), plugin_to_plain(part)
            differing = sorted(k for k in {*wanted, *has} if wanted.get(k) != has.get(k))
            raise UserError(
                f"{kind} of {folder} is not the one this run asks for",
                found=", ".join(f"{k}={has.get(k)}" for k in differing),
                expected=", ".join(f"{k}={wanted.get(k)}" for k in differing),
                remedy=f"give the run the {kind} that the folder was trained with, or start from another folder",
            )
    if selector is not None and parse_integration(integration) != parse_integration(config.integration):
        raise UserError(
            f"integration of {folder} is not the one this run asks for", found=f"{config.integration}",
            expected=f"{integration}",
            remedy="give the run the integration of the folder (integration=none for none), or start from another one",
        )  # fmt: skip
    own = parse_tiling(config.tiling)
    if tiling not in (None, own):
        raise UserError(
            f"tiling of {folder} is not the one this run asks for", found=f"{to_plain(own)}",
            expected=f"{to_plain(tiling)}",
            remedy="give the run the tiling that the folder was made with, or assemble one with another",
        )  # fmt: skip
    with torch.device("meta"):
        model = AnchorFormerForConditionalGeneration(config)
    tied = set(model.all_tied_weights_keys)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    compare_shapes(f"model folder {folder}", read_shapes(folder), expected)
    return config


def load_model(
    folder: Path, dtype: torch.dtype, connector: Mapping[str, Any] | None = None
) -> AnchorFormerForConditionalGeneration:
    """The model of a folder, every tensor from the files; call `check_folder` first for errors in plain words.

    Args:
        connector: the connector as `check_folder` has compared it, where it is to be run with options of its own; that
            of the folder otherwise.

    Raises:
        UserError: a tensor missing, left over or of another shape.
    """
    model, info = AnchorFormerForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True,
        **({"connector": dict(connector)} if connector else {}),
    )  # fmt: skip
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if key.endswith("_keys") and value}
    if wrong:
        raise UserError(
            f"weights of {folder} do not fit its configuration", found=wrong, expected="every tensor exactly once",
            remedy="start from a folder written by this version",
        )  # fmt: skip
    return model


def load_tower(folder: Path, dtype: torch.dtype) -> VisionTower:
    """The vision tower of a folder by itself, frozen; nothing else is read.

    Raises:
        UserError: a tensor missing, left over or of another shape.
    """
    config = AnchorFormerConfig.from_pretrained(folder)
    selector, _ = parse_parts(config.selector, config.connector)
    with torch.random.fork_rng(devices=[]):
        tower = VisionTower.from_config(config.vision_config, selector.needs)
    state: dict[str, Tensor] = {}
    for name in sorted({file for key, file in read_index(folder).items() if key.startswith("vision_tower.")}):
        state |= {key.removeprefix("vision_tower."): value for key, value in load_file(folder / name).items()}
    shapes = {name: tuple(value.shape) for name, value in tower.state_dict().items()}
    compare_shapes(f"vision tower of {folder}", {name: tuple(value.shape) for name, value in state.items()}, shapes)
    tower.load_state_dict(state)
    return tower.to(dtype).requires_grad_(False).eval()


def _check_type(folder: Path) -> None:
    check_present(folder / CONFIG)
    found = read_object(folder / CONFIG).get("model_type")
    if found != AnchorFormerConfig.model_type:
        raise UserError(
            f"{folder} holds another kind of model", found=f"model_type={found!r}",
            expected=AnchorFormerConfig.model_type,
            remedy="turn it into one with `python -m anchorformer.import_llava` first" if found == "llava"
            else "assemble it with `python -m anchorformer.assemble` first",
        )  # fmt: skip


def _check_generation(folder: Path) -> None:
    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True).validate(strict=True)
    except (OSError, ValueError) as error:
        # transformers refuses to save such a file, which would be found out when a trained model is written.
        raise UserError(
            f"{folder / 'generation_config.json'} is not valid", found=" ".join(str(error).split())[:300],
            expected="values that go together, such as do_sample=true beside a temperature",
            remedy="correct or remove those values, and the file's entry in MANIFEST.json, or assemble the model again",
        ) from None  # fmt: skip
