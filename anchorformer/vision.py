"""Any Hugging Face ViT as a vision tower: the tapped layer's tokens and [CLS] scores, nothing computed beyond it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from anchorformer.contracts import VisionFeatures, VisionNeeds
from anchorformer.errors import UserError
from anchorformer.hub import check_complete
from anchorformer.kernels.vision_attention import VISION_ATTENTION, park_cls_scores, pop_cls_scores
from anchorformer.selectors.base import names_without_cls


@dataclass(frozen=True)
class _Family:
    """Where a family of towers keeps its parts.

    Attributes:
        layers: path of the list of blocks.
        embed: pixels to the first block's input, hidden state 0.
        unused: modules that only what lies behind the tapped layer needs.
        unused_parameters: parameters that no forward reads.
        has_cls: whether token 0 is [CLS].
    """

    layers: str
    embed: Callable[[Any, Tensor], Tensor]
    unused: tuple[str, ...]
    unused_parameters: tuple[str, ...] = ()
    has_cls: bool = True


def _dinov2() -> _Family:
    return _Family(
        layers="encoder.layer",
        embed=lambda model, pixels: model.embeddings(pixels),
        unused=("layernorm",),
        unused_parameters=("embeddings.mask_token",),
    )


FAMILIES = {
    "clip_vision_model": _Family(
        layers="encoder.layers",
        embed=lambda model, pixels: model.pre_layrnorm(model.embeddings(pixels)),
        unused=("post_layernorm",),
    ),
    "siglip_vision_model": _Family(
        layers="encoder.layers",
        embed=lambda model, pixels: model.embeddings(pixels),
        unused=("post_layernorm", "head"),
        has_cls=False,
    ),
    "dinov2": _dinov2(),
    "dinov2_with_registers": _dinov2(),
}
"""Towers that can be used, by the `model_type` of their vision config."""


class VisionTower(nn.Module):
    """A ViT cut off behind the tapped layer, with fused attention in every block.

    The state dict is `model.` + the Hugging Face names of what was kept. While no parameter requires a gradient the
    forward runs under `no_grad` and without dropout, whatever mode the surrounding model is in; one that does makes
    the tower an ordinary trainable module.

    Attributes:
        num_tokens: N, [CLS] counted and registers not, for square images of `image_size`.
        num_heads: attention heads of the tapped block.
        has_cls: whether token 0 is [CLS].
        width: V, width of the tokens.
        image_size: pixels per side of the images it takes.
    """

    def __init__(self, model: PreTrainedModel, needs: VisionNeeds) -> None:
        """Takes over `model`, which may still have all of its layers, and trims it.

        Raises:
            UserError: unknown family, a layer it does not have, [CLS] scores of a tower without [CLS].
        """
        super().__init__()
        config = model.config
        self._family = _family(config)
        self.needs = needs
        self.has_cls = self._family.has_cls
        self.num_registers = int(getattr(config, "num_register_tokens", 0))
        self.num_heads = int(config.num_attention_heads)
        self.width = int(config.hidden_size)
        self.image_size = int(config.image_size)
        self.num_tokens = (self.image_size // int(config.patch_size)) ** 2 + self.has_cls
        _check_cls(config, self.has_cls, needs)

        self.model = model
        layers = self._layers
        del layers[_num_layers_needed(needs.layer, len(layers)) :]
        for path in self._family.unused:
            if hasattr(model, path):  # SigLIP's pooling head is optional
                delattr(model, path)
        for path in self._family.unused_parameters:
            _parameter_to_buffer(model, path)
        model.set_attn_implementation(VISION_ATTENTION)
        if needs.cls_scores:
            park_cls_scores(self._tapped_attention)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, needs: VisionNeeds) -> VisionTower:
        """A tower with fresh weights from the config of the *whole* Hugging Face tower; only what is kept is built.

        Raises:
            UserError: as the constructor.
        """
        config = copy.deepcopy(_vision_config(config))
        _family(config)
        _check_cls(config, _family(config).has_cls, needs)
        config.num_hidden_layers = _num_layers_needed(needs.layer, config.num_hidden_layers)
        # The blocks are cut already: the tapped layer is now the last one.
        model = AutoModel.from_config(config, attn_implementation=VISION_ATTENTION)
        tower = cls(model, VisionNeeds(layer=-1, cls_scores=needs.cls_scores))
        tower.needs = needs
        return tower

    @classmethod
    def from_backbone(cls, source: str | Path, needs: VisionNeeds, dtype: torch.dtype | None = None) -> VisionTower:
        """A tower with the weights of a published backbone: a hub id or a folder, of the tower alone or of CLIP/SigLIP.

        Raises:
            UserError: tensors missing or of another shape; and as the constructor.
        """
        full = AutoConfig.from_pretrained(source, trust_remote_code=False)
        config = _vision_config(full)
        _family(config)
        _check_cls(config, _family(config).has_cls, needs)
        model_class = AutoModel._model_mapping[type(config)]
        with _quiet_loading():
            model, report = model_class.from_pretrained(
                source, config=config, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True,
                trust_remote_code=False,
            )  # fmt: skip
        tower = cls(model, needs)
        check_complete("vision tower", source, model.state_dict().keys(), report)
        return tower

    @property
    def frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.model.parameters())

    def train(self, mode: bool = True) -> VisionTower:
        """Frozen towers stay in eval mode: their dropout and stochastic depth would only add noise."""
        return super().train(mode and not self.frozen)

    def forward(self, pixels_B3HW: Tensor) -> VisionFeatures:
        """
        Args:
            pixels_B3HW: normalised floats, B images of `image_size` squared.

        Returns:
            the needed features; without graph while the tower is frozen. Scores never carry a gradient.

        Raises:
            UserError: images of another size.
        """
        if pixels_B3HW.shape[1:] != (3, self.image_size, self.image_size):
            raise UserError(
                "images do not fit the vision tower",
                found=f"(B, 3, H, W) = {tuple(pixels_B3HW.shape)}",
                expected=f"H = W = {self.image_size}",
                remedy="use the processor saved with the model, which resizes to the tower's size",
            )
        frozen = self.frozen
        if frozen and self.model.training:  # frozen after the last call of train()
            self.eval()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            tokens = self._family.embed(self.model, pixels_B3HW.to(next(self.model.parameters()).dtype))
            for layer in self._layers:
                tokens = layer(tokens, attention_mask=None) if self._takes_mask else layer(tokens)
            scores = self._pop_scores()
        return VisionFeatures(
            tokens_BNV=self._without_registers(tokens, 1),
            cls_scores_BHN=None if scores is None else self._without_registers(scores, 2),
            has_cls=self.has_cls,
        )

    @property
    def _layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.model.get_submodule(self._family.layers))

    @property
    def _takes_mask(self) -> bool:
        # CLIP's and SigLIP's blocks require the argument; DINOv2's have none in older versions of transformers.
        return not self.model.config.model_type.startswith("dinov2")

    @property
    def _tapped_attention(self) -> nn.Module:
        """The module of the last block that calls the attention function; its place in the block varies by version."""
        (attention,) = (module for module in self._layers[-1].modules() if hasattr(module, "is_causal"))
        return attention

    def _pop_scores(self) -> Tensor | None:
        if not self.needs.cls_scores:
            return None
        scores = pop_cls_scores(self._tapped_attention)
        if scores is None:
            raise UserError(
                "the vision tower left no [CLS] scores",
                found=f"attn_implementation={self.model.config._attn_implementation!r} in the vision tower",
                expected=repr(VISION_ATTENTION),
                remedy="set attn_implementation for the language model only, not for the whole model",
            )
        return scores

    def _without_registers(self, x: Tensor, dim: int) -> Tensor:
        if not self.num_registers:
            return x
        patches = x.shape[dim] - 1 - self.num_registers
        return torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 1 + self.num_registers, patches)], dim=dim)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without transformers' table of a whole CLIP's text half, left out on purpose; gaps are reported by the caller."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The tower's own config where a config of a two-tower model was given."""
    return cast(PreTrainedConfig, getattr(config, "vision_config", config))


def _family(config: PreTrainedConfig) -> _Family:
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            "this vision tower is not supported",
            found=f"model_type={config.model_type!r}",
            expected=f"one of {sorted(FAMILIES)}",
            remedy="choose such a tower, or add its family to vision.py",
        )
    return family


def _check_cls(config: PreTrainedConfig, has_cls: bool, needs: VisionNeeds) -> None:
    if needs.cls_scores and not has_cls:
        raise UserError(
            "the selector needs [CLS] scores",
            found=f"a {config.model_type} tower, which has no [CLS] token",
            expected=f"a tower with [CLS], or one of the selectors {names_without_cls()}",
            remedy="choose another vision tower (CLIP, DINOv2) or another selector",
        )


def _num_layers_needed(layer: int, num_layers: int) -> int:
    """How many blocks produce hidden state `layer`, counted as Hugging Face does (0 = embeddings, -1 = last block)."""
    needed = layer if layer >= 0 else num_layers + 1 + layer
    if not 1 <= needed <= num_layers:
        raise UserError(
            "the vision tower has no such layer",
            found=f"layer={layer} of a tower with {num_layers} blocks",
            expected=f"1 to {num_layers}, or -{num_layers} to -1",
            remedy="correct `layer` of the selector",
        )
    return needed


def _parameter_to_buffer(model: nn.Module, path: str) -> None:
    """Keeps the attribute for the model's own code, but neither trains nor saves it."""
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    value = getattr(owner, name)
    if value is not None:
        delattr(owner, name)
        owner.register_buffer(name, value.detach(), persistent=False)
