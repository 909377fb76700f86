"""Builds vision tower + language model + fresh connector once, as the model folder that every training starts from."""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.convert import from_published, read_published
from anchorformer.errors import UserError, run_guarded
from anchorformer.hub import check_complete, load
from anchorformer.images import ImageTransform
from anchorformer.model_folder import part_state, write_parts
from anchorformer.parts import parse_integration, parse_parts, parse_tiling
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.schema import Schema, parse, plugin_to_plain, to_plain
from anchorformer.tiling import UNTILED, Tiling
from anchorformer.views import build_integration, embeddings_per_view
from anchorformer.vision import VisionTower

log = logging.getLogger(__name__)


def assemble(
    vision: str, language_model: str, selector: Mapping[str, Any], connector: Mapping[str, Any], out: Path,
    *, template: str, tiling: Mapping[str, Any] | None = None, integration: Mapping[str, Any] | None = None,
    seed: int = 0, projector: Path | None = None,
) -> Path:  # fmt: skip
    """Writes a model folder; the backbones keep the precision they were published in, the connector starts in fp32.

    Args:
        vision: hub id or folder of a CLIP, DINOv2 or SigLIP model (a full CLIP serves, its text half is left out).
        language_model: hub id or folder of a causal language model with its tokenizer.
        selector, connector: plug-in mappings.
        out: folder to be written; appears under its name only when complete.
        template: conversation template of the processor; a run may choose another for its stage.
        tiling: fields of `anchorformer.tiling.Tiling`; none for one tile per image.
        integration: plug-in mapping; none for a language model that sees no more than the connector's embeddings.
        seed: of the fresh connector's weights, and of the integration's.
        projector: file of published weights that the connector starts from, in AnchorFormer's or LLaVA's layout
            (`anchorformer.convert`); none for a fresh one.

    Raises:
        UserError: a backbone that cannot be found or does not fit the selector or connector; a projector that cannot be
            read or does not fit the connector.
    """
    # Everything that can be refused is refused here, from configurations and tokenizer files alone.
    selector_config, connector_config = parse_parts(selector, connector)
    tiling_config, integration_config = parse_tiling(tiling or {}), parse_integration(integration)
    vision_config, text_config = _vision_config(vision), _text_config(language_model)
    mean, std = image_statistics(vision)
    with torch.device("meta"):
        shape = VisionTower.from_config(vision_config, selector_config.needs)
    processor = AnchorFormerProcessor(
        ImageTransform.for_statistics(shape.image_size, mean, tiling_config),
        load("tokenizer", language_model, AutoTokenizer.from_pretrained),
        num_image_tokens=embeddings_per_view(
            tiling_config, selector_config, connector_config, shape.num_tokens, shape.num_heads, shape.has_cls
        ),
        template=template,
    )
    with torch.device("meta"):
        unfilled = connector_config.build(shape.width, text_config.hidden_size).state_dict()
        build_integration(
            integration_config, tiling_config, selector_config, shape, text_config, processor.num_image_tokens
        )
    published = None if projector is None else from_published(read_published(projector), unfilled)

    log.info("vision tower from %s", vision)
    tower = load("vision tower", vision, lambda name, **_: VisionTower.from_backbone(name, selector_config.needs))
    log.info("language model from %s", language_model)
    llm, report = load(
        "language model", language_model, AutoModelForCausalLM.from_pretrained, dtype="auto",
        output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    check_complete("language model", language_model, llm.state_dict().keys(), report)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = connector_config.build(tower.width, text_config.hidden_size)
        if published is not None:
            fresh.load_state_dict(published)
        integrated = build_integration(
            integration_config, tiling_config, selector_config, tower, text_config, processor.num_image_tokens
        )
        if len(processor.tokenizer) > llm.get_input_embeddings().num_embeddings:
            llm.resize_token_embeddings(len(processor.tokenizer))

    config = AnchorFormerConfig(
        vision_config=vision_config, text_config=llm.config,
        selector=plugin_to_plain(selector_config), connector=plugin_to_plain(connector_config),
        image_token_id=processor.image_token_id, image_mean=mean, image_std=std,
        tiling=to_plain(tiling_config) if tiling_config.grids else {},
        integration=None if integration_config is None else plugin_to_plain(integration_config),
        architectures=["AnchorFormerForConditionalGeneration"],
    )  # fmt: skip
    model = torch.nn.ModuleDict({"vision_tower": tower, "connector": fresh, "language_model": llm})
    if integrated is not None:
        model["integration"] = integrated
    tied = {f"language_model.{name}" for name in llm.all_tied_weights_keys}
    return write_folder(out, config, processor, {part: part_state(model, part, tied) for part in model})


def write_folder(
    out: Path, config: AnchorFormerConfig, processor: AnchorFormerProcessor,
    parts: Mapping[str, Mapping[str, Tensor]],
) -> Path:  # fmt: skip
    """A model folder with everything that stands beside the weights; it appears under its name only when complete.

    Args:
        parts: as `write_parts` takes them.
    """
    generation = GenerationConfig.from_model_config(config.text_config)
    # A placeholder is something that is read, never something that is said.
    generation.update(
        suppress_tokens=[processor.image_token_id], pad_token_id=_pad_token_id(processor.tokenizer),
        eos_token_id=processor.stop_token_ids,
    )  # fmt: skip
    partial = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for description in (config, generation, processor):
        description.save_pretrained(partial)
    write_parts(partial, parts)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    tiling = processor.image_transform.tiling
    unit = "tile" if tiling.grids and not tiling.spans_tiles else "image"
    count = processor.num_image_tokens
    log.info(
        "model folder %s: %s per %s", out, "embeddings as it needs" if count is None else f"{count} embeddings", unit
    )
    return out


def _vision_config(name: str) -> PreTrainedConfig:
    config = load("vision tower", name, AutoConfig.from_pretrained)
    return getattr(config, "vision_config", config)


def _text_config(name: str) -> PreTrainedConfig:
    config = load("language model", name, AutoConfig.from_pretrained)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            "the language model is not one", found=f"{name}, model_type={config.model_type!r}",
            expected="a causal language model, such as Llama, Vicuna, Mistral or Qwen2",
            remedy="check whether model.vision and model.language_model have been swapped",
        )  # fmt: skip
    return config


def image_statistics(vision: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel that the tower's images were normalised with."""
    role = "vision tower's preprocessor_config.json"
    values, _ = load(role, vision, ImageProcessingMixin.get_image_processor_dict)
    mean, std = values.get("image_mean"), values.get("image_std")
    if not (_is_rgb(mean) and _is_rgb(std) and min(std) > 0):
        raise UserError(
            f"no image statistics beside {vision}", found=f"image_mean={mean}, image_std={std}",
            expected="preprocessor_config.json with image_mean and image_std, three numbers each",
            remedy="copy the file from the published model into the folder",
        )  # fmt: skip
    (red, green, blue), (red_std, green_std, blue_std) = mean, std
    return (red, green, blue), (red_std, green_std, blue_std)


def _is_rgb(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(item, (int, float)) for item in value)


def _pad_token_id(tokenizer: Any) -> int | None:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


@dataclass(frozen=True, kw_only=True)
class Recipe(Schema):
    """What the YAML file of the command holds."""

    vision: str
    language_model: str
    selector: dict[str, Any]
    connector: dict[str, Any]
    tiling: Tiling = UNTILED
    integration: dict[str, Any] | None = None


def read_recipe(path: Path) -> Recipe:
    """The parts that a YAML file names.

    Raises:
        UserError: no such file, no YAML, or other keys than those of `Recipe`.
    """
    remedy = "write vision, language_model, selector and connector as in the config.yaml of a run, under model"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read", found=" ".join(str(error).split()), expected="a YAML file", remedy=remedy
        ) from None
    return parse(Recipe, values if isinstance(values, dict) else {}, str(path), remedy)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m anchorformer.assemble", description=__doc__)
    keys = "vision, language_model, selector, connector[, tiling, integration]"
    parser.add_argument("model", type=Path, help=f"YAML with {keys}")
    parser.add_argument("out", type=Path, help="folder to be written")
    parser.add_argument("--template", default="v1", help="conversation template of the processor (default: v1)")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh connector (default: 0)")
    parser.add_argument(
        "--projector", type=Path, help="published weights to start the connector from, as mm_projector.bin"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = read_recipe(options.model)
    assemble(
        recipe.vision, recipe.language_model, recipe.selector, recipe.connector, options.out,
        template=options.template, tiling=to_plain(recipe.tiling), integration=recipe.integration, seed=options.seed,
        projector=options.projector,
    )  # fmt: skip


if __name__ == "__main__":
    run_guarded(main)
