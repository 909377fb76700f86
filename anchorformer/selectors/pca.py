"""The PCA rule: the patches that lie furthest along the first three principal components of their image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anchorformer.contracts import VisionFeatures
from anchorformer.selectors.base import ClsAndPatches, ClsAndPatchesConfig

NUM_COMPONENTS = 3


@dataclass(frozen=True, kw_only=True)
class PcaSelectorConfig(ClsAndPatchesConfig):
    """Sum of three principal components; on CUDA the decomposition makes the host wait."""

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> PcaSelector:
        return PcaSelector(self.count(num_tokens, num_heads, has_cls))


class PcaSelector(ClsAndPatches):
    """Score = sum of a patch's first three principal components, within its own image and without [CLS].

    Patches are centred per image. The sign of a component is arbitrary; here the projection of the largest magnitude is
    positive, and of two equally large ones that of the lower index. Computed in fp32.
    Source: the PCA comparison of AnchorFormer, arXiv 2405.18405, which leaves centring and signs open.
    """

    def scores(self, features: VisionFeatures) -> Tensor:
        patches_BPV = features.patches_BPV.float()
        centred_BPV = patches_BPV - patches_BPV.mean(1, keepdim=True)
        with torch.autocast(centred_BPV.device.type, enabled=False):
            # Eigenvectors of the smaller of the two products; those of P x P, scaled, are the projections themselves.
            values_BP, vectors_BPP = torch.linalg.eigh(centred_BPV @ centred_BPV.mT)
        scale_B3 = values_BP[:, -NUM_COMPONENTS:].clamp(min=0).sqrt()
        projections_BP3 = vectors_BPP[:, :, -NUM_COMPONENTS:] * scale_B3.unsqueeze(1)
        furthest_B3 = projections_BP3.abs().argmax(1, keepdim=True)
        return (projections_BP3 * projections_BP3.gather(1, furthest_B3).sign()).sum(-1)
