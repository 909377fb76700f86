"""Token-level correlation: as many patches as the image holds information, other numbers of them for other images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from anchorformer.contracts import VisionFeatures, VisionNeeds
from anchorformer.selectors.base import RaggedSelector, SelectorConfig, needed, require_cls
from anchorformer.selectors.random import MAX_SEED, hashes

DRAW_BITS = 23
"""Of a hash; fp32 holds such a number and a half of it exactly."""


@dataclass(frozen=True, kw_only=True)
class CorrelationSelectorConfig(SelectorConfig):
    """Patches sampled in a low layer, as many as are not redundant there, and the outliers of a deep one.

    What is published and what is our choice is said in `conf/selector/correlation.yaml`.
    """

    ragged = True

    low_layer: int = 2
    """Whose keys say how redundant patches are, and whose [CLS] query guides the sampling; counted like `layer`."""
    deep_layer: int = -2
    """Whose [CLS] attention is searched for outliers; another one than `low_layer`."""
    tau: Annotated[float, Field(gt=-1, lt=1)] = 0.9
    """Cosine of two patches' keys above which they are neighbours."""
    min_neighbours: Annotated[int, Field(ge=0)] = 8
    """A patch with more neighbours than this is redundant."""
    iqr_factor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.5
    """Interquartile ranges above the third quartile from which an attention is an outlier."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Another seed samples other patches. It is the selector's own: the seed of a run changes nothing here."""
    expected_share: Annotated[float, Field(gt=0, le=1)] = field(default=0.34, compare=False)  # changes no choice
    """Share of an image's patches that memory and time are planned with (`train.plan`): no image was looked at yet."""

    @property
    def needs(self) -> VisionNeeds:
        return VisionNeeds(layer=self.layer, qk=(self.low_layer, self.deep_layer), image_key=True)

    @property
    def needs_cls(self) -> bool:
        return True

    def count(self, num_tokens: int, num_heads: int, has_cls: bool) -> int:
        """Every patch: the most that an image may have.

        Raises:
            UserError: a tower without [CLS].
        """
        require_cls("correlation", has_cls)
        return num_tokens - 1

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> CorrelationSelector:
        self.count(num_tokens, num_heads, has_cls)
        return CorrelationSelector(self)


class CorrelationSelector(RaggedSelector):
    """Union of two branches, [CLS] dropped.

    Local: in the low layer a patch is redundant if its key has a cosine above `tau` to those of more than
    `min_neighbours` others. The density of an image is the share of its other patches; so many patches, at least one,
    are drawn without replacement with the probabilities that the [CLS] query gives to the patches' keys. Global: the
    patches whose attention by the [CLS] query of the deep layer is an outlier above.

    Draws are Gumbel variates made of a hash of seed, image content and position: the patches of an image are the same
    in training, evaluation and after a resume, on every rank and in every batch.

    Source: after Token-level Correlation-guided Compression, arXiv 2407.14439, from its description; no code of it was
    found (`docs/methods.md` says what is our reading).
    """

    def __init__(self, config: CorrelationSelectorConfig) -> None:
        super().__init__()
        self.config = config

    def choose(self, features: VisionFeatures) -> Tensor:
        # The first two taps: others may stand behind them.
        query_BLV, keys_BLPV = needed(features.query_BLV)[:, :2].float(), needed(features.keys_BLNV)[:, :2, 1:].float()
        with torch.autocast(keys_BLPV.device.type, enabled=False):  # which and how many hang on these products
            logits_BLP = torch.einsum("blv,blpv->blp", query_BLV, keys_BLPV) * query_BLV.shape[-1] ** -0.5
            count_B = self._informative(keys_BLPV[:, 0])
        low_BP, deep_BP = logits_BLP.unbind(1)
        sampled_BP = self._sampled(low_BP, count_B, needed(features.image_key_B))
        return F.pad(sampled_BP | self._outliers(deep_BP.softmax(-1)), (1, 0))

    def _informative(self, keys_BPV: Tensor) -> Tensor:
        """How many patches are not redundant, at least one: (B,)."""
        unit_BPV = F.normalize(keys_BPV, dim=-1)
        near_BPP = unit_BPV @ unit_BPV.mT > self.config.tau
        neighbours_BP = near_BPP.sum(-1) - near_BPP.diagonal(dim1=1, dim2=2).long()
        return (neighbours_BP <= self.config.min_neighbours).sum(-1).clamp(min=1)

    def _sampled(self, logits_BP: Tensor, count_B: Tensor, image_key_B: Tensor) -> Tensor:
        """`count_B` patches drawn without replacement from the softmax of the logits (Gumbel top-k), bool (B, P)."""
        number_BP = hashes(image_key_B, self.config.seed, logits_BP.shape[1]) >> (32 - DRAW_BITS)
        uniform_BP = (number_BP.float() + 0.5) / 2**DRAW_BITS
        scores_BP = logits_BP - (-uniform_BP.log()).log()
        ranks_BP = scores_BP.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return ranks_BP < count_B[:, None]

    def _outliers(self, attention_BP: Tensor) -> Tensor:
        ascending_BP = attention_BP.sort(dim=-1).values
        first_B, third_B = _quantile(ascending_BP, 0.25), _quantile(ascending_BP, 0.75)
        border_B = third_B + self.config.iqr_factor * (third_B - first_B)
        return attention_BP > border_B[:, None]


def _quantile(ascending_BP: Tensor, share: float) -> Tensor:
    """Linear between the two nearest values, as `torch.quantile`, which takes no empty batch and waits for the host."""
    place = share * (ascending_BP.shape[1] - 1)
    below = int(place)
    above = min(below + 1, ascending_BP.shape[1] - 1)
    return ascending_BP[:, below].lerp(ascending_BP[:, above], place - below)
