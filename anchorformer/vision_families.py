"""The families of vision towers that can be used: where each keeps its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig

from anchorformer.errors import UserError


@dataclass(frozen=True)
class Family:
    """Where the towers of one `model_type` keep their parts.

    Attributes:
        layers: path of the list of blocks.
        embed: pixels to the first block's input, hidden state 0.
        final_norm: the norm behind the last block.
        unused: modules behind that norm.
        unused_parameters: parameters that no forward reads.
        has_cls: whether token 0 is [CLS].
    """

    layers: str
    embed: Callable[[Any, Tensor], Tensor]
    final_norm: str
    unused: tuple[str, ...] = ()
    unused_parameters: tuple[str, ...] = ()
    has_cls: bool = True


def _dinov2() -> Family:
    return Family(
        layers="encoder.layer",
        embed=lambda model, pixels: model.embeddings(pixels),
        final_norm="layernorm",
        unused_parameters=("embeddings.mask_token",),
    )


FAMILIES = {
    "clip_vision_model": Family(
        layers="encoder.layers",
        embed=lambda model, pixels: model.pre_layrnorm(model.embeddings(pixels)),
        final_norm="post_layernorm",
    ),
    "siglip_vision_model": Family(
        layers="encoder.layers",
        embed=lambda model, pixels: model.embeddings(pixels),
        final_norm="post_layernorm",
        unused=("head",),
        has_cls=False,
    ),
    "dinov2": _dinov2(),
    "dinov2_with_registers": _dinov2(),
}
"""Towers that can be used, by the `model_type` of their vision config."""


def vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The tower's own config where a config of a two-tower model was given."""
    return cast(PreTrainedConfig, getattr(config, "vision_config", config))


def family_of(config: PreTrainedConfig) -> Family:
    """
    Raises:
        UserError: no family of that `model_type`.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            "this vision tower is not supported",
            found=f"model_type={config.model_type!r}",
            expected=f"one of {sorted(FAMILIES)}",
            remedy="choose such a tower, or add its family to vision_families.py",
        )
    return family


def attention_of(layer: nn.Module) -> nn.Module:
    """The module of a block that calls the attention function; its place in the block varies by version."""
    (attention,) = (module for module in layer.modules() if hasattr(module, "is_causal"))
    return attention
