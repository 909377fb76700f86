"""The sizes that arithmetic and memory follow from, as configurations on disk state them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from anchorformer.schema import TARGET
from anchorformer.tiling import UNTILED, Tiling
from train.choices import Part
from train.config import RunConfig
from train.plan.connectors import ConnectorShape, Surroundings, connector_shape
from train.plan.integrations import IntegrationShape, integration_shape
from train.plan.spec import field_of, row_of

_VIT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {**_VIT, "intermediate_size": 3072, "patch_size": 32, "hidden_act": "quick_gelu"},
    "siglip_vision_model": {**_VIT, "intermediate_size": 3072, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh"},
    "dinov2": {**_VIT, "mlp_ratio": 4, "patch_size": 14, "hidden_act": "gelu"},
    "dinov2_with_registers": {
        **_VIT, "mlp_ratio": 4, "patch_size": 16, "hidden_act": "gelu", "num_register_tokens": 4,
    },
}  # fmt: skip
_LLAMA = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": None, "vocab_size": 32000,
}  # fmt: skip
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": {**_LLAMA, "intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936},
    "qwen3": {
        **_LLAMA,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "head_dim": 128,
    },
}
"""What transformers takes where a config.json says nothing, per family that the plan knows."""


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """A vision tower, cut behind the tapped layer.

    Attributes:
        layers: blocks that run.
        prefix: tokens before the patches: [CLS] and registers.
        activation: as Hugging Face names it.
        parameters: of what is kept.
    """

    width: int
    inner: int
    layers: int
    heads: int
    patch: int
    image_size: int
    prefix: int
    has_cls: bool
    activation: str
    scales_layers: bool
    parameters: int

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def attended(self) -> int:
        """Tokens in its attention, registers counted."""
        return self.patches + self.prefix

    @property
    def tokens(self) -> int:
        """N: tokens that it hands on, registers not counted."""
        return self.patches + self.has_cls


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """A Llama-like language model.

    Attributes:
        query, key: width of all query heads and of all key heads together.
        matrices: weights of one layer that multiply every position.
        parameters: all of them.
    """

    width: int
    inner: int
    layers: int
    heads: int
    query: int
    key: int
    vocabulary: int
    matrices: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """All sizes of a model.

    Attributes:
        tiles: most that an image is cut into.
        view: tiles that the connector looks at together, at most; its costs are those of one such view.
        most_anchors: of a view, where the image decides how many it has: an expected number is planned with. None:
            every view has as many.
    """

    vision: VisionShape
    connector: ConnectorShape
    text: TextShape
    tiles: int = 1
    view: int = 1
    integration: IntegrationShape | None = None
    most_anchors: int | None = None

    @property
    def parameters(self) -> dict[Part, int]:
        """Per part that the model has."""
        integration = {} if self.integration is None else {Part.integration: self.integration.parameters}
        return {
            Part.vision_tower: self.vision.parameters,
            Part.connector: self.connector.parameters,
            **integration,
            Part.language_model: self.text.parameters,
        }


def shapes_of(
    vision: Mapping[str, Any], text: Mapping[str, Any], selector: Mapping[str, Any], connector: Mapping[str, Any],
    tiling: Tiling = UNTILED, integration: Mapping[str, Any] | None = None,
) -> Shapes:  # fmt: skip
    """
    Args:
        vision, text: the backbones' config.json; of a two-tower model the half that sees is taken.
        selector, connector, integration: plug-in mappings with all of their fields.

    Raises:
        UserError: a family, selector, connector or integration whose cost is not written down here.
    """
    target, is_whole = str(selector.get(TARGET)), selector.get(TARGET) in _WHOLE_TOWER
    read = [field_of(selector, "selector", name) for name in ("layer", *_ALSO_READ.get(target, ()))]
    tower = _vision(vision.get("vision_config") or vision, read, is_whole)
    language_model = _text(text)
    tiles = max(tiling.counts)
    view = tiles if tiling.spans_tiles else 1
    patches = view * tower.patches
    around = Surroundings(
        anchors=_anchors(selector, tower, view), tokens=patches + tower.has_cls, patches=patches,
        vision=tower.width, text=language_model.width,
    )  # fmt: skip
    return Shapes(
        vision=tower, connector=connector_shape(connector, around), text=language_model, tiles=tiles, view=view,
        integration=None if integration is None else integration_shape(integration, around),
        most_anchors=tower.patches if target in _RAGGED else None,
    )  # fmt: skip


def read_shapes(config: RunConfig) -> Shapes:
    """The sizes of a run's model, from the folder it starts from, where there is one, or from its backbones.

    Raises:
        UserError: a backbone whose config.json is neither on this machine nor published under `model.published`, one
            that contradicts what is published; and what `shapes_of` raises.
    """
    model = config.model
    start = _start(config)
    if start is not None:
        vision, text = start["vision_config"], start["text_config"]
    else:
        vision, text = (_backbone(name, model.published) for name in (model.vision, model.language_model))
    return shapes_of(vision, text, model.selector, model.connector, model.tiling, model.integration)


def _start(config: RunConfig) -> dict[str, Any] | None:
    if config.init_from is None:
        return None
    files = (Path(config.init_from) / "model" / "config.json", Path(config.init_from) / "config.json")
    return next((json.loads(file.read_text()) for file in files if file.is_file()), None)


def _backbone(name: str, published: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    file, stated = _config_file(name), published.get(name)
    if file is None:
        if stated is None:
            is_path = name.startswith(("/", ".", "~"))
            raise UserError(
                f"the shape of {name} is not known here",
                found=f"no config.json in {'that folder' if is_path else 'the cache of the hub'}",
                expected="that file, or the shape under model.published",
                remedy="check the path" if is_path else f"hf download {name} config.json",
            )
        return dict(stated)
    found: dict[str, Any] = json.loads(file.read_text())
    facts = {**found, **found.get("vision_config", {})}
    wrong = {key: value for key, value in (stated or {}).items() if facts.get(key, value) != value}
    if wrong:
        raise UserError(
            f"{name} is not what model.published says", found=f"{ {key: facts[key] for key in wrong} } in {file}",
            expected=f"{wrong}", remedy="correct model.published, or name another model",
        )  # fmt: skip
    return found


def _config_file(name: str) -> Path | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        file = folder / "config.json"
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path, not an id
        return None
    return Path(cached) if isinstance(cached, str) else None


def _vision(config: Mapping[str, Any], read: Sequence[int], is_whole: bool) -> VisionShape:
    """A tower that is cut behind the last of the layers that are read, or with `is_whole` behind its last norm."""
    family, get = _family(config, VISION_DEFAULTS, "vision tower")
    width, patch, is_dino = get("hidden_size"), get("patch_size"), family.startswith("dinov2")
    inner = int(width * get("mlp_ratio")) if is_dino else get("intermediate_size")
    if config.get("use_swiglu_ffn"):
        raise UserError(
            "the plan knows no gated feed-forward in a vision tower", found="use_swiglu_ffn", expected="a plain one",
            remedy="choose another vision tower, or run unplanned: hardware.card=null",
        )  # fmt: skip
    blocks = get("num_hidden_layers")
    layers = blocks if is_whole else max(layer if layer >= 0 else blocks + 1 + layer for layer in read)
    has_cls = family != "siglip_vision_model"
    prefix = has_cls + (get("num_register_tokens") if family == "dinov2_with_registers" else 0)
    patches = (get("image_size") // patch) ** 2
    # Matrices with biases, two norms; DINOv2 also scales what each of the two halves of a block adds.
    block = 4 * width * (width + 1) + 2 * width * inner + inner + width + 4 * width + 2 * width * is_dino
    positions = patches + has_cls
    around = 3 * patch**2 * width + (prefix + positions) * width
    around += 2 * width if family == "clip_vision_model" else width  # its norm before the blocks, or a patch bias
    around += 2 * width * is_whole  # the norm behind the last block
    return VisionShape(
        width=width, inner=inner, layers=layers, heads=get("num_attention_heads"), patch=patch,
        image_size=get("image_size"), prefix=prefix, has_cls=has_cls, activation=get("hidden_act"),
        scales_layers=is_dino, parameters=around + layers * block,
    )  # fmt: skip


def _anchors(selector: Mapping[str, Any], tower: VisionShape, view: int) -> int:
    if "num_anchors" in selector:  # T, by that name in every selector that has a choice
        return int(selector["num_anchors"])
    return view * row_of(selector, "selector", _SELECTORS)(selector, tower)


def _text(config: Mapping[str, Any]) -> TextShape:
    family, get = _family(config, TEXT_DEFAULTS, "language model")
    width, inner, layers, heads = (
        get(name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    )
    head_width = get("head_dim") if family == "qwen3" else config.get("head_dim") or width // heads
    query, key = heads * head_width, (get("num_key_value_heads") or heads) * head_width
    matrices = 2 * width * query + 2 * width * key + 3 * width * inner
    biases = query + 2 * key if family == "qwen2" or config.get("attention_bias") else 0
    biases += width if config.get("attention_bias") else 0
    biases += 2 * inner + width if config.get("mlp_bias") else 0
    biases += 2 * head_width if family == "qwen3" else 0  # norms of queries and keys
    embeddings = get("vocab_size") * width * (1 if config.get("tie_word_embeddings") else 2)
    return TextShape(
        width=width, inner=inner, layers=layers, heads=heads, query=query, key=key, vocabulary=get("vocab_size"),
        matrices=matrices, parameters=layers * (matrices + biases + 2 * width) + embeddings + width,
    )  # fmt: skip


def _family(
    config: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]], what: str
) -> tuple[str, Callable[[str], Any]]:
    family = str(config.get("model_type"))
    if family not in defaults:
        raise UserError(
            f"the plan does not know this {what}", found=f"model_type={family}", expected=f"one of {sorted(defaults)}",
            remedy="add its family to train/plan/shapes.py, or run unplanned: hardware.card=null",
        )  # fmt: skip
    # A value of null in config.json means the default as well.
    return family, lambda name: defaults[family][name] if config.get(name) is None else config[name]


_WHOLE_TOWER = ("anchorformer.selectors.cls_similarity.ClsSimilaritySelectorConfig",)
"""Selectors that read the tower's final output."""
_CORRELATION = "anchorformer.selectors.correlation.CorrelationSelectorConfig"
_ALSO_READ = {
    "anchorformer.selectors.prumerge_plus.PruMergePlusSelectorConfig": ("attention_layer",),
    _CORRELATION: ("low_layer", "deep_layer"),
}
"""Fields that name layers which a selector reads beside `layer`."""
_RAGGED = (_CORRELATION,)
"""Selectors of which images have different numbers of anchors; `_SELECTORS` says what is expected."""
_SELECTORS: dict[str, Callable[[Mapping[str, Any], VisionShape], int]] = {
    "anchorformer.selectors.all.AllSelectorConfig": lambda _, tower: tower.patches,
    "anchorformer.selectors.mean_pool.MeanPoolSelectorConfig": lambda spec, tower: (
        tower.has_cls + tower.patches // field_of(spec, "selector", "window") ** 2
    ),
    _CORRELATION: lambda spec, tower: max(1, round(field_of(spec, "selector", "expected_share") * tower.patches)),
}
"""Anchors of those that have no `num_anchors`."""
