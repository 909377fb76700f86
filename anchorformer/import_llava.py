"""Turns a Hugging Face LLaVA-1.5 folder into a model folder that shows its language model selected tokens only."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig

from anchorformer import selectors
from anchorformer.assemble import image_statistics, write_folder
from anchorformer.configuration import AnchorFormerConfig
from anchorformer.connectors.identity import IdentityConfig
from anchorformer.errors import UserError, run_guarded
from anchorformer.hub import CONFIG, INDEX, check_files, load, read_object, read_weight_map
from anchorformer.images import ImageTransform
from anchorformer.model_folder import PARTS, compare_shapes, read_header
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.parts import parse_parts
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.schema import TARGET, plugin_to_plain, plugins_by_name
from anchorformer.selectors.anchor import AnchorSelectorConfig
from anchorformer.selectors.base import ClsAndPatchesConfig, SelectorConfig

log = logging.getLogger(__name__)

SINGLE_SHARD = "model.safetensors"

RENAMED = (
    (re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)"), r"vision_tower.model.\1"),
    (re.compile(r"(?:model\.)?multi_modal_projector\.linear_1\.(.+)"), r"connector.projector.0.\1"),
    (re.compile(r"(?:model\.)?multi_modal_projector\.linear_2\.(.+)"), r"connector.projector.2.\1"),
    (re.compile(r"(?:language_model\.)?lm_head\.(.+)"), r"language_model.lm_head.\1"),
    (re.compile(r"(?:language_model\.model|model\.language_model)\.(.+)"), r"language_model.model.\1"),
)
"""Their names and ours: of transformers 4 (`language_model.model.`, `vision_tower.vision_model.`) and of transformers 5
(`model.language_model.`, `model.vision_tower.`); 5 still saves as 4 did, without `vision_model.`."""

NO_WEIGHTS = re.compile(r"\.(position_ids|rotary_emb\.inv_freq)$")
"""Buffers that older versions saved with the weights, and that every model computes by itself."""


def import_llava(folder: Path, selector: Mapping[str, Any], out: Path, *, template: str = "v1") -> Path:
    """Writes a model folder whose selector prunes before LLaVA's own projector, without any training.

    With selector `all` the model is LLaVA itself. Weights keep their precision and are copied shard by shard, so that
    no more than one shard is in memory.

    Args:
        folder: of a `LlavaForConditionalGeneration` in the shape of LLaVA-1.5 (CLIP or another tower, Llama).
        selector: plug-in mapping; its layer, where given, has to be the one that LLaVA projects.
        out: folder to be written; appears under its name only when complete.
        template: conversation template; LLaVA-1.5 was trained with `v1`.

    Raises:
        UserError: another kind of model (LLaVA-NeXT, another language model or projector, several layers), another
            layer, a tokenizer that numbers the image token otherwise, or tensors that are missing, left over or of
            another shape.
    """
    theirs = _read_config(folder)
    layer = theirs.vision_feature_layer
    selector_config, connector_config = parse_parts({"layer": layer, **selector}, plugin_to_plain(IdentityConfig()))
    if selector_config.layer != layer:
        raise UserError(
            "the projector has never seen what the selector reads", found=f"selector.layer={selector_config.layer}",
            expected=f"{layer}, the vision_feature_layer of {folder}", remedy="leave selector.layer out",
        )  # fmt: skip
    mean, std = image_statistics(str(folder))
    config = AnchorFormerConfig(
        vision_config=theirs.vision_config, text_config=theirs.text_config,
        selector=plugin_to_plain(selector_config), connector=plugin_to_plain(connector_config),
        image_token_id=theirs.image_token_index, image_mean=mean, image_std=std,
        architectures=[AnchorFormerForConditionalGeneration.__name__],
    )  # fmt: skip
    with torch.device("meta"):
        model = AnchorFormerForConditionalGeneration(config)
        whole_tower = AutoModel.from_config(theirs.vision_config)
    image_size = model.vision_tower.image_size
    processor = AnchorFormerProcessor(
        ImageTransform.for_statistics(image_size, mean),
        load("tokenizer", folder, AutoTokenizer.from_pretrained),
        num_image_tokens=model.num_image_tokens,
        template=template,
    )
    if processor.image_token_id != config.image_token_id:
        raise UserError(
            f"the tokenizer of {folder} does not number {processor.image_token} as its model does",
            found=processor.image_token_id, expected=f"image_token_index={config.image_token_id} of {CONFIG}",
            remedy="copy tokenizer and config.json from one published model",
        )  # fmt: skip

    unused = {*model.all_tied_weights_keys, *(f"vision_tower.model.{name}" for name in whole_tower.state_dict())}
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}
    found = _locate(folder)
    kept = {ours: place for ours, place in found.items() if ours in expected or ours not in unused}
    compare_shapes(f"LLaVA folder {folder}", {ours: shape for ours, (_, _, shape) in kept.items()}, expected)
    log.info("%s: images are padded to squares of %d pixels, as LLaVA-1.5 was trained, whatever the folder's own "
             "image processor would do; template %s", folder, image_size, template)  # fmt: skip
    if model.vision_tower.has_cls and isinstance(selector_config, AnchorSelectorConfig | ClsAndPatchesConfig):
        log.warning("selector %s keeps [CLS], which LLaVA's projector has never been given in training; fastervlm, "
                    "vtc_cls and received keep patches only", type(selector_config).__name__)  # fmt: skip
    parts = {part: _Streamed({k: v for k, v in kept.items() if k.startswith(f"{part}.")}) for part in PARTS}
    return write_folder(out, config, processor, parts)


class _Streamed(Mapping[str, Tensor]):
    """Tensors of other files under names of ours, read each time they are asked for."""

    def __init__(self, places: Mapping[str, tuple[Path, str, tuple[int, ...]]]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        path, key, _ = self._places[name]
        with safe_open(path, framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _locate(folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Our name -> file, name in it, and shape of every tensor of the folder.

    Raises:
        UserError: no safetensors, or a name of no LLaVA-1.5.
    """
    names = set(read_weight_map(folder).values()) if (folder / INDEX).is_file() else {SINGLE_SHARD}
    located = {}
    for name in sorted(names):
        for key, shape in read_header(folder / name).items():
            if NO_WEIGHTS.search(key):
                continue
            ours = next((pattern.sub(new, key) for pattern, new in RENAMED if pattern.fullmatch(key)), None)
            if ours is None or ours in located:
                raise UserError(
                    f"{folder / name} holds a tensor that LLaVA-1.5 has not", found=key,
                    expected="vision_tower, multi_modal_projector.linear_1 and linear_2, language_model, each once",
                    remedy="only folders of transformers' LlavaForConditionalGeneration can be imported",
                )  # fmt: skip
            located[ours] = folder / name, key, shape
    return located


def _read_config(folder: Path) -> PreTrainedConfig:
    """LLaVA's configuration, with everything checked that this import takes for granted.

    Raises:
        UserError: naming the first value that is otherwise.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} is no model folder", found=f"no {CONFIG}", expected="a LlavaForConditionalGeneration folder",
            remedy="download the whole repository, such as llava-hf/llava-1.5-7b-hf, and name its folder",
        )  # fmt: skip
    check_files(folder)
    found = read_object(folder / CONFIG)
    if found.get("model_type") != "llava" or "mm_vision_tower" in found:
        raise _unsupported(
            folder, f"model_type={found.get('model_type')!r}, {found.get('architectures')}",
            "model_type='llava' as transformers writes it (not LLaVA-NeXT, nor the original repository's layout)",
        )  # fmt: skip
    config = load("LLaVA configuration", folder, AutoConfig.from_pretrained)
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    for name, value, wanted in (
        ("text_config.model_type", config.text_config.model_type, "llama"),
        ("projector_hidden_act", config.projector_hidden_act, "gelu"),
        ("multimodal_projector_bias", config.multimodal_projector_bias, True),
        ("vision_feature_select_strategy", strategy, "default"),
    ):
        if value != wanted:
            raise _unsupported(folder, f"{name}={value!r}", f"{name}={wanted!r}, as in LLaVA-1.5")
    if not isinstance(layer, int):
        raise _unsupported(folder, f"vision_feature_layer={layer}", "one layer")
    return config


def _unsupported(folder: Path, found: str, expected: str) -> UserError:
    return UserError(
        f"{folder} is not in the shape of LLaVA-1.5", found=found, expected=expected,
        remedy="name a folder such as llava-hf/llava-1.5-7b-hf; models of other shapes cannot be pruned this way",
    )  # fmt: skip


def read_selector(overrides: Sequence[str]) -> dict[str, Any]:
    """The plug-in mapping of `selector=NAME` and any `selector.KEY=VALUE`.

    Raises:
        UserError: no or an unknown selector, or something else than these.
    """
    values: dict[str, Any] = {}
    name = None
    for text in overrides:
        key, _, value = text.partition("=")
        if key == "selector" and value:
            name = value
        elif key.startswith("selector.") and value:
            values[key.removeprefix("selector.")] = _value(text, value)
        else:
            raise _unreadable(text)
    kinds = plugins_by_name(SelectorConfig, selectors.__name__)
    if name not in kinds:
        raise UserError(
            "which tokens are to be kept?", found=f"selector={name}" if name else "no selector=NAME",
            expected=f"one of {', '.join(sorted(kinds))}", remedy="e.g. selector=anchor selector.num_anchors=145",
        )  # fmt: skip
    return {TARGET: f"{kinds[name].__module__}.{kinds[name].__qualname__}", **values}


def _value(text: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise _unreadable(text) from None


def _unreadable(text: str) -> UserError:
    return UserError(
        "an argument cannot be read", found=text, expected="selector=NAME or selector.KEY=VALUE",
        remedy="e.g. selector=fastervlm selector.num_anchors=64",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m anchorformer.import_llava", description=__doc__)
    parser.add_argument("folder", type=Path, help="of a LlavaForConditionalGeneration, as transformers saves it")
    parser.add_argument("out", type=Path, help="model folder to be written")
    parser.add_argument("selector", nargs="*", help="selector=NAME, and its values as selector.KEY=VALUE")
    parser.add_argument("--template", default="v1", help="conversation template (default: v1, as trained)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import_llava(options.folder, read_selector(options.selector), options.out, template=options.template)


if __name__ == "__main__":
    run_guarded(main)
