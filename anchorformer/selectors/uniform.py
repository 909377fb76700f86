"""Patches spread evenly over the image, whatever it shows: the baseline of every rule that looks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.raster import side_of
from anchorformer.selectors.base import ClsAndPatchesConfig, Selector, anchors_at


@dataclass(frozen=True, kw_only=True)
class UniformSelectorConfig(ClsAndPatchesConfig):
    """A lattice of patches, [CLS] first where the tower has one."""

    spans_tiles = False  # a lattice needs the raster of one tile

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> UniformSelector:
        num_patches = self.count(num_tokens, num_heads, has_cls) - has_cls
        return UniformSelector(num_patches, side_of(num_tokens - has_cls, "the patches that selector 'uniform' reads"))


class UniformSelector(Selector):
    """The same patches for every image."""

    def __init__(self, num_patches: int, side: int) -> None:
        super().__init__()
        self.num_patches = num_patches
        self.side = side

    def forward(self, features: VisionFeatures) -> Anchors:
        indices_T = lattice(self.num_patches, self.side, features.tokens_BNV.device)
        if features.has_cls:
            indices_T = F.pad(indices_T + 1, (1, 0))
        return anchors_at(features, indices_T.expand(features.tokens_BNV.shape[0], -1))


def lattice(count: int, side: int, device: torch.device | None = None) -> Tensor:
    """Raster positions of `count` patches in about as many rows as columns, each in the middle of its share: (count,).

    A regular grid where `count` is a square whose root divides `side`.
    """
    rows = round(count**0.5)
    place = torch.arange(count, device=device)
    row = ((place + 1) * rows - 1) // count
    first, behind = row * count // rows, (row + 1) * count // rows
    return _middle(row, rows, side) * side + _middle(place - first, behind - first, side)


def _middle(share: Tensor, shares: Tensor | int, side: int) -> Tensor:
    return (2 * share + 1) * side // (2 * shares)
