"""Any Hugging Face ViT as a vision tower: what a selector needs of its layers, and nothing computed beyond that."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from anchorformer.contracts import VisionFeatures, VisionNeeds
from anchorformer.errors import UserError
from anchorformer.hub import check_complete
from anchorformer.kernels.vision_attention import (
    VISION_ATTENTION,
    park_cls_scores,
    park_nothing,
    park_qk,
    park_received,
    pop_cls_scores,
    pop_qk,
    pop_received,
)
from anchorformer.selectors.base import without_cls
from anchorformer.tapped_layers import counted, num_layers_needed, resolved
from anchorformer.vision_families import attention_of, family_of, vision_config

Left = TypeVar("Left", Tensor, tuple[Tensor, Tensor])


class VisionTower(nn.Module):
    """A ViT cut off behind the last layer that is needed, with fused attention in every block.

    The state dict is `model.` + the Hugging Face names of what was kept. While no parameter requires a gradient the
    forward runs under `no_grad` and without dropout, whatever mode the surrounding model is in; one that does makes
    the tower an ordinary trainable module.

    Attributes:
        num_tokens: N, [CLS] counted and registers not, for square images of `image_size`.
        num_heads: attention heads of the tapped block.
        has_cls: whether token 0 is [CLS].
        width: V, width of the tokens.
        image_size: pixels per side of the images it takes.
        num_layers_whole: blocks before it was cut; layers are counted in these.
    """

    def __init__(self, model: PreTrainedModel, needs: VisionNeeds) -> None:
        """Takes over `model`, which may still have all of its layers, and trims it.

        Raises:
            UserError: unknown family, a layer it does not have, [CLS] scores of a tower without [CLS].
        """
        super().__init__()
        config = model.config
        self._family = family_of(config)
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
        self.num_layers_whole = len(layers)
        self._tapped = resolved(needs, len(layers))
        del layers[num_layers_needed(self._tapped, len(layers)) :]
        for path in self._family.unused if needs.final else (*self._family.unused, self._family.final_norm):
            if hasattr(model, path):  # SigLIP's pooling head is optional
                delattr(model, path)
        for path in self._family.unused_parameters:
            _parameter_to_buffer(model, path)
        model.set_attn_implementation(VISION_ATTENTION)
        for number, layer in enumerate(layers, start=1):
            park_nothing(attention_of(layer))
            if self._reads_cls_row(number):
                park_cls_scores(attention_of(layer))
            if needs.received and number == self._tapped.layer:
                park_received(attention_of(layer))
            if number in self._tapped.qk:
                park_qk(attention_of(layer))
        self._freeze_what_only_ranks()

    @classmethod
    def from_config(cls, config: PreTrainedConfig, needs: VisionNeeds) -> VisionTower:
        """A tower with fresh weights from the config of the *whole* Hugging Face tower; only what is kept is built.

        Raises:
            UserError: as the constructor.
        """
        config = copy.deepcopy(vision_config(config))
        family_of(config)
        _check_cls(config, family_of(config).has_cls, needs)
        # Layers are counted from the front before the blocks are cut: that holds for what is left, too.
        whole = config.num_hidden_layers
        tapped = resolved(needs, whole)
        config.num_hidden_layers = num_layers_needed(tapped, whole)
        tower = cls(AutoModel.from_config(config, attn_implementation=VISION_ATTENTION), tapped)
        tower.needs, tower.num_layers_whole = needs, whole
        return tower

    @classmethod
    def from_backbone(cls, source: str | Path, needs: VisionNeeds, dtype: torch.dtype | None = None) -> VisionTower:
        """A tower with the weights of a published backbone: a hub id or a folder, of the tower alone or of CLIP/SigLIP.

        Raises:
            UserError: tensors missing or of another shape; and as the constructor.
        """
        full = AutoConfig.from_pretrained(source, trust_remote_code=False)
        config = vision_config(full)
        family_of(config)
        _check_cls(config, family_of(config).has_cls, needs)
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
    def num_layers(self) -> int:
        """Blocks that are kept."""
        return len(self._layers)

    def has_blocks_for(self, needs: VisionNeeds) -> bool:
        """Whether what was kept is enough to tap this; it is not where no tower of so many blocks could."""
        try:
            last = num_layers_needed(resolved(needs, self.num_layers_whole), self.num_layers_whole)
        except UserError:
            return False
        return last <= self.num_layers and (self.needs.final or not needs.final)

    def counted_from_front(self, layer: int) -> int:
        """A layer of the whole tower, 1 for the output of its first block.

        Raises:
            UserError: the tower did not have it before it was cut.
        """
        return counted("layer", layer, self.num_layers_whole)

    def retapped(self, needs: VisionNeeds) -> VisionTower:
        """A frozen tower in evaluation mode that taps what `needs` says; its weights are those of this one, shared.

        Raises:
            UserError: it would need blocks that were cut off, or as the constructor.
        """
        tapped = resolved(needs, self.num_layers_whole)
        if not self.has_blocks_for(needs):
            raise UserError(
                "the vision tower was cut before what is to be read of it", found=f"{self.num_layers} blocks, {needs}",
                expected=f"layers up to {self.num_layers}, as the model's selector needed them",
                remedy="name an earlier layer, or assemble the model with a selector that reads a later one",
            )  # fmt: skip
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        tower = VisionTower(copy.deepcopy(self.model, shared), tapped)
        tower.needs, tower.num_layers_whole = needs, self.num_layers_whole
        return tower.requires_grad_(False).eval()

    @property
    def tapped_layer(self) -> int:
        """The hidden state that is handed on, counted from the front: 1 is the output of the first block."""
        return self._tapped.layer

    @property
    def frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.model.parameters())

    def requires_grad_(self, requires_grad: bool = True) -> VisionTower:
        """What lies behind the tapped layer only ranks patches: no gradient reaches it, and it is never trained."""
        super().requires_grad_(requires_grad)
        self._freeze_what_only_ranks()
        return self

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
            return self._features(pixels_B3HW)

    def _features(self, pixels_B3HW: Tensor) -> VisionFeatures:
        tapped = self._tapped
        scores: Tensor | None = None
        rows: list[Tensor] = []
        tokens = self._family.embed(self.model, pixels_B3HW.to(next(self.model.parameters()).dtype))
        for number, layer in zip(range(1, tapped.layer + 1), self._layers, strict=False):
            tokens = self._run(layer, tokens)
            if self._reads_cls_row(number):
                scores = self._left(pop_cls_scores(attention_of(layer)))
                if tapped.cls_attention_from is not None:
                    rows.append(scores.softmax(-1).mean(1))
        received = self._left(pop_received(attention_of(self._layers[tapped.layer - 1]))) if tapped.received else None
        behind = self._behind(tokens)
        qk = [self._left(pop_qk(attention_of(self._layers[number - 1]))) for number in tapped.qk]
        keys_BLNV = self._without_registers(torch.stack([keys for _, keys in qk], 1), 2) if qk else None
        return VisionFeatures(
            tokens_BNV=self._without_registers(tokens, 1),
            cls_scores_BHN=self._without_registers(scores, 2) if tapped.cls_scores and scores is not None else None,
            has_cls=self.has_cls,
            cls_attention_BLN=self._without_registers(torch.stack(rows, 1), 2) if rows else None,
            received_BN=None if received is None else self._without_registers(received, 1),
            query_BLV=torch.stack([query for query, _ in qk], 1) if qk and self.has_cls else None,
            keys_BLNV=keys_BLNV,
            final_BNV=self._without_registers(self._final_norm(behind), 1) if tapped.final else None,
            image_key_B=image_key(pixels_B3HW) if tapped.image_key else None,
        )

    @torch.no_grad()
    def _behind(self, tokens: Tensor) -> Tensor:
        """What the blocks behind the tapped one make of its tokens; these blocks only rank."""
        for layer in islice(self._layers, self._tapped.layer, None):
            tokens = self._run(layer, tokens)
        return tokens

    def _freeze_what_only_ranks(self) -> None:
        for layer in islice(self._layers, self.tapped_layer, None):
            layer.requires_grad_(False)
        if self.needs.final:
            self._final_norm.requires_grad_(False)

    @property
    def _final_norm(self) -> nn.Module:
        return self.model.get_submodule(self._family.final_norm)

    def _run(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        return cast(Tensor, layer(tokens, attention_mask=None) if self._takes_mask else layer(tokens))

    def _reads_cls_row(self, number: int) -> bool:
        """Whether the [CLS] row of the block that produces this hidden state is needed."""
        first = self._tapped.cls_attention_from
        if first is not None and first <= number <= self._tapped.layer:
            return True
        return self._tapped.cls_scores and number == self._tapped.layer

    @property
    def _layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.model.get_submodule(self._family.layers))

    @property
    def _takes_mask(self) -> bool:
        # CLIP's and SigLIP's blocks require the argument; DINOv2's have none in older versions of transformers.
        return not self.model.config.model_type.startswith("dinov2")

    def _left(self, found: Left | None) -> Left:
        """What a tapped block has left of this forward."""
        if found is None:
            raise UserError(
                "the vision tower left no attention scores",
                found=f"attn_implementation={self.model.config._attn_implementation!r} in the vision tower",
                expected=repr(VISION_ATTENTION),
                remedy="set attn_implementation for the language model only, not for the whole model",
            )
        return found

    def _without_registers(self, x: Tensor, dim: int) -> Tensor:
        if not self.num_registers:
            return x
        patches = x.shape[dim] - 1 - self.num_registers
        return torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 1 + self.num_registers, patches)], dim=dim)


def image_key(pixels_B3HW: Tensor) -> Tensor:
    """A number per image, a function of its pixels alone: int64 (B,), 0 to 2**32 - 1, without host synchronisation.

    Pixels are counted in 1/32, coarse enough that a normalisation which rounds differently on another device changes
    none of them, and summed with fixed odd weights; integers have one sum, in whatever order.
    """
    levels_BP = (pixels_B3HW.detach().float() * 32).round().long().flatten(1)
    weights_P = torch.arange(levels_BP.shape[1], device=levels_BP.device) * 0x9E3779B1 | 1
    return (levels_BP * (weights_P & 0xFFFFFFFF)).sum(1) & 0xFFFFFFFF


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without transformers' table of a whole CLIP's text half, left out on purpose; gaps are reported by the caller."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _check_cls(config: PreTrainedConfig, has_cls: bool, needs: VisionNeeds) -> None:
    if needs.cls and not has_cls:
        raise without_cls("the selector", f"a {config.model_type} tower")


def _parameter_to_buffer(model: nn.Module, path: str) -> None:
    """Keeps the attribute for the model's own code, but neither trains nor saves it."""
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    value = getattr(owner, name)
    if value is not None:
        delattr(owner, name)
        owner.register_buffer(name, value.detach(), persistent=False)
