"""Patches at random, other ones for every image: the baseline of every rule that looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from anchorformer.contracts import VisionFeatures, VisionNeeds
from anchorformer.selectors.base import ClsAndPatches, ClsAndPatchesConfig, needed

MAX_SEED = 0xFFFFFFFF
_WORD = MAX_SEED


@dataclass(frozen=True, kw_only=True)
class RandomSelectorConfig(ClsAndPatchesConfig):
    """[CLS] where the tower has one, and patches drawn without replacement."""

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Another seed draws other patches. It is the selector's own: the seed of a run changes nothing here."""
    per_image: bool = True
    """Whether every image gets patches of its own; false draws once for all of them."""

    @property
    def needs(self) -> VisionNeeds:
        return VisionNeeds(layer=self.layer, image_key=self.per_image)

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> RandomSelector:
        return RandomSelector(self.count(num_tokens, num_heads, has_cls), self.seed, self.per_image)


class RandomSelector(ClsAndPatches):
    """Score = a hash of seed, image content and position. No generator is involved, so the patches of an image are the
    same in training, evaluation and after a resume, on every rank and device, and in every batch."""

    def __init__(self, num_anchors: int, seed: int, per_image: bool) -> None:
        super().__init__(num_anchors)
        self.seed = seed
        self.per_image = per_image

    def scores(self, features: VisionFeatures) -> Tensor:
        batch, num_patches = features.patches_BPV.shape[:2]
        device = features.tokens_BNV.device
        key_B = needed(features.image_key_B) if self.per_image else torch.zeros(batch, dtype=torch.int64, device=device)
        return (hashes(key_B, self.seed, num_patches) >> 8).float()  # 24 bits, which fp32 holds exactly


def hashes(image_key_B: Tensor, seed: int, num_patches: int) -> Tensor:
    """A number from 0 to 2**32 - 1 for each patch of each image, int64 (B, P), made of seed, image and position."""
    image_B1 = _mix(image_key_B ^ seed * 0x9E3779B1 & _WORD).unsqueeze(1)
    patch_P = _mix(torch.arange(1, num_patches + 1, device=image_key_B.device))
    return _mix(image_B1 ^ patch_P)


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on int64; products wrap, and their lower 32 bits are right all the same."""
    x = (x ^ x >> 16) * 0x85EBCA6B & _WORD
    x = (x ^ x >> 13) * 0xC2B2AE35 & _WORD
    return x ^ x >> 16
