"""The PruMerge+ rule: patches that stand out to [CLS] and a lattice of others, each with what resembles it added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from anchorformer.contracts import Anchors, VisionFeatures, VisionNeeds
from anchorformer.errors import UserError
from anchorformer.kernels.selection import select_anchors
from anchorformer.selectors.base import PatchSelectorConfig, Selector, needed, vectors_at


@dataclass(frozen=True, kw_only=True)
class PruMergePlusSelectorConfig(PatchSelectorConfig):
    """T tokens: T-1 patches, merged with their neighbours, and one token of all that is dropped. Every block runs."""

    spans_tiles = False  # neither the lattice nor the weights, which one softmax adds up to one, are those of several

    num_anchors: Annotated[int, Field(ge=1)] = 145
    """T: the kept patches and the token of the dropped ones; [CLS] is not kept."""
    spacing: Annotated[int, Field(ge=1)] = 6
    """Every so many patches in raster order one is kept, whatever it shows; 11, 6 and 3 where 64, 128 and 256 tokens
    were compared with by VTC-CLS' code."""
    neighbours: Annotated[int, Field(ge=1)] = 32
    """Most similar other patches that are added to each kept one, as in the released code."""
    attention_layer: int = -1
    """Layer whose block ranks and compares, counted like `layer`; the released code reads the last one."""

    @property
    def needs(self) -> VisionNeeds:
        return VisionNeeds(layer=self.layer, qk=(self.attention_layer,))

    @property
    def needs_cls(self) -> bool:
        return True

    def count(self, num_tokens: int, num_heads: int, has_cls: bool) -> int:
        """
        Raises:
            UserError: no [CLS]; fewer tokens than the lattice and one for the rest, or no patch left to drop; fewer
                other patches than neighbours.
        """
        self._check_cls(has_cls)
        patches = num_tokens - has_cls
        fewest = len(lattice(self.spacing, patches)) + 1
        fitting = min(max(self.num_anchors, fewest), patches)
        if fitting != self.num_anchors:
            raise UserError(
                f"num_anchors={self.num_anchors} does not fit this vision tower",
                found=f"{patches} patches, {fewest - 1} of them on a lattice of spacing={self.spacing}",
                expected=f"{fewest} to {patches}", remedy=f"set num_anchors={fitting}",
            )  # fmt: skip
        if self.neighbours >= patches:
            raise UserError(
                f"neighbours={self.neighbours} does not fit this vision tower", found=f"{patches} patches",
                expected=f"1 to {patches - 1}", remedy=f"set `neighbours` of the selector to {patches - 1}, or less",
            )  # fmt: skip
        return self.num_anchors

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> PruMergePlusSelector:
        self.count(num_tokens, num_heads, has_cls)
        return PruMergePlusSelector(self.num_anchors, lattice(self.spacing, num_tokens - has_cls), self.neighbours)


class PruMergePlusSelector(Selector):
    """Kept patches ascend, each plus the attention-weighted sum of its neighbours; then that of all dropped patches.

    Attention is that of [CLS] with all heads as one: softmax(q k^T / sqrt(V)) over [CLS] and patches. Neighbours are
    the patches, kept or not, with the largest cosine of keys. Sums are not divided. Computed in fp32.
    Source: LLaVA-PruMerge, arXiv 2403.15388, and its code, with a fixed T in place of its outliers' number.
    """

    def __init__(self, num_anchors: int, lattice_G: range, neighbours: int) -> None:
        super().__init__()
        self.num_anchors, self.lattice, self.neighbours = num_anchors, lattice_G, neighbours

    def forward(self, features: VisionFeatures) -> Anchors:
        keys_BNV = needed(features.keys_BLNV)[:, 0].float()
        query_BV = needed(features.query_BLV)[:, 0].float()
        tokens_BPV = features.tokens_BNV[:, 1:].float()
        with torch.autocast(tokens_BPV.device.type, enabled=False):
            logits_BN = (keys_BNV @ query_BV.unsqueeze(-1)).squeeze(-1) * keys_BNV.shape[-1] ** -0.5
            weights_BP = logits_BN.softmax(-1)[:, 1:]
            kept_BK = self._kept(logits_BN)
            directions_BPV = normalize(keys_BNV[:, 1:], dim=-1)
            weights_BKP = weights_BP.unsqueeze(1) * self._are_neighbours(directions_BPV, kept_BK)
            merged_BKV = vectors_at(tokens_BPV, kept_BK) + weights_BKP @ tokens_BPV
            dropped_BP = weights_BP.scatter(1, kept_BK, 0.0)
            rest_B1V = dropped_BP.unsqueeze(1) @ tokens_BPV
        return Anchors(torch.cat([merged_BKV, rest_B1V], dim=1).to(features.tokens_BNV.dtype), indices_BT=None)

    def _kept(self, logits_BN: Tensor) -> Tensor:
        """Patches (0 = the first one): the lattice, and beside it those of the highest attention; ascending."""
        logits_BN = logits_BN.clone()
        logits_BN[:, 1 + self.lattice.start : 1 + self.lattice.stop : self.lattice.step] = torch.inf
        # The anchor rule with one head, which always takes column 0.
        return select_anchors(logits_BN.unsqueeze(1), self.num_anchors)[:, 1:] - 1

    def _are_neighbours(self, directions_BPV: Tensor, kept_BK: Tensor) -> Tensor:
        """Which patches are added to each kept one: (B, K, P), 1 or 0."""
        cosines_BKP = vectors_at(directions_BPV, kept_BK) @ directions_BPV.mT
        cosines_BKP = cosines_BKP.scatter(2, kept_BK.unsqueeze(-1), -torch.inf)  # none is its own neighbour
        nearest = cosines_BKP.topk(self.neighbours, dim=-1).indices
        return torch.zeros_like(cosines_BKP).scatter(2, nearest, 1.0)


def lattice(spacing: int, num_patches: int) -> range:
    """Raster positions that are kept whatever they show; as in the released code never the last patch."""
    return range(0, num_patches - 1, spacing)
