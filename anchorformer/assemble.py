"""Builds vision tower + language model + fresh connector once, as the model folder that every training starts from."""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.errors import UserError, run_guarded
from anchorformer.images import ImageTransform
from anchorformer.modeling import parse_parts
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.schema import plugin_to_plain
from anchorformer.vision import VisionTower
from anchorformer.weights import part_state, write_parts

log = logging.getLogger(__name__)


def assemble(
    vision: str, language_model: str, selector: Mapping[str, Any], connector: Mapping[str, Any], out: Path,
    *, template: str, seed: int = 0,
) -> Path:  # fmt: skip
    """Writes a model folder; the backbones keep the precision they were published in, the connector starts in fp32.

    Args:
        vision: hub id or folder of a CLIP, DINOv2 or SigLIP model (a full CLIP serves, its text half is left out).
        language_model: hub id or folder of a causal language model with its tokenizer.
        selector, connector: plug-in mappings.
        out: folder to be written; appears under its name only when complete.
        template: conversation template of the processor; a run may choose another for its stage.
        seed: of the fresh connector's weights.

    Raises:
        UserError: a backbone that cannot be found or does not fit the selector or connector.
    """
    # Everything that can be refused is refused here, from configurations and tokenizer files alone.
    selector_config, connector_config = parse_parts(selector, connector)
    vision_config, text_config = _vision_config(vision), _text_config(language_model)
    mean, std = _image_statistics(vision)
    with torch.device("meta"):
        shape = VisionTower.from_config(vision_config, selector_config.needs)
    num_anchors = selector_config.count(shape.num_tokens, shape.num_heads, shape.has_cls)
    processor = AnchorFormerProcessor(
        ImageTransform.for_statistics(shape.image_size, mean),
        _load("tokenizer", language_model, AutoTokenizer.from_pretrained),
        num_image_tokens=connector_config.count(shape.num_tokens, num_anchors, shape.has_cls),
        template=template,
    )

    log.info("vision tower from %s", vision)
    tower = _load("vision tower", vision, lambda name, **_: VisionTower.from_backbone(name, selector_config.needs))
    log.info("language model from %s", language_model)
    llm = _load("language model", language_model, AutoModelForCausalLM.from_pretrained, dtype="auto")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = connector_config.build(tower.width, text_config.hidden_size)
        if len(processor.tokenizer) > llm.get_input_embeddings().num_embeddings:
            llm.resize_token_embeddings(len(processor.tokenizer))

    config = AnchorFormerConfig(
        vision_config=vision_config, text_config=llm.config,
        selector=plugin_to_plain(selector_config), connector=plugin_to_plain(connector_config),
        image_token_id=processor.image_token_id, image_mean=mean, image_std=std,
        architectures=["AnchorFormerForConditionalGeneration"],
    )  # fmt: skip
    generation = GenerationConfig.from_model_config(llm.config)
    # A placeholder is something that is read, never something that is said.
    generation.update(suppress_tokens=[processor.image_token_id], pad_token_id=_pad_token_id(processor.tokenizer))

    partial = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for description in (config, generation, processor):
        description.save_pretrained(partial)
    model = torch.nn.ModuleDict({"vision_tower": tower, "connector": fresh, "language_model": llm})
    tied = {f"language_model.{name}" for name in llm.all_tied_weights_keys}
    write_parts(partial, {part: part_state(model, part, tied) for part in model})
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    log.info("model folder %s: %d embeddings per image", out, processor.num_image_tokens)
    return out


def _load(role: str, name: str, load: Callable[..., Any], **options: Any) -> Any:
    """A part of a backbone, from the hub or a folder; never code from there."""
    is_path = name.startswith(("/", ".", "~"))
    try:
        if is_path and not Path(name).is_dir():
            raise FileNotFoundError("no such folder")
        return load(name, trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the {role} cannot be loaded", found=f"{name}: {str(error).splitlines()[0]}",
            expected="a complete Hugging Face folder" if is_path else "a hub id that can be reached, or a folder",
            remedy="check the path; a clone without git-lfs holds pointers instead of weights" if is_path
            else "check the name, or download it first and give the folder",
        ) from None  # fmt: skip


def _vision_config(name: str) -> PreTrainedConfig:
    config = _load("vision tower", name, AutoConfig.from_pretrained)
    return getattr(config, "vision_config", config)


def _text_config(name: str) -> PreTrainedConfig:
    config = _load("language model", name, AutoConfig.from_pretrained)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            "the language model is not one", found=f"{name}, model_type={config.model_type!r}",
            expected="a causal language model, such as Llama, Vicuna, Mistral or Qwen2",
            remedy="check whether model.vision and model.language_model have been swapped",
        )  # fmt: skip
    return config


def _image_statistics(vision: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(vision)
        (red, green, blue), (red_std, green_std, blue_std) = values["image_mean"], values["image_std"]
        return (red, green, blue), (red_std, green_std, blue_std)
    except (OSError, KeyError) as error:
        raise UserError(
            f"no image statistics beside the vision tower {vision}", found=str(error).splitlines()[0],
            expected="preprocessor_config.json with image_mean and image_std",
            remedy="copy the file from the published model into the folder",
        ) from None  # fmt: skip


def _pad_token_id(tokenizer: Any) -> int | None:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m anchorformer.assemble", description=__doc__)
    parser.add_argument("model", type=Path, help="YAML with vision, language_model, selector, connector")
    parser.add_argument("out", type=Path, help="folder to be written")
    parser.add_argument("--template", default="v1", help="conversation template of the processor (default: v1)")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh connector (default: 0)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    assemble(**yaml.safe_load(options.model.read_text()), out=options.out, template=options.template, seed=options.seed)


if __name__ == "__main__":
    run_guarded(main)
