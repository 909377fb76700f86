"""The published parts in the shapes of ours, to stand in for them inside a model, and the published padded step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel

from anchorformer.contracts import IGNORE_INDEX, Anchors, Example, VisionFeatures
from anchorformer.fusion import fuse
from anchorformer.kernels.cross_entropy import cross_entropy_sum
from anchorformer.selectors.base import Selector
from anchorformer.vision import VisionTower
from bench.gpu.shapes import Scale, made_in
from bench.published import head
from bench.published.batching import pad
from bench.published.selection import select
from bench.published.vision import PublishedTower


class PublishedVision(nn.Module):
    """All blocks with eager maps; the [CLS] row of the map (softmax weights) stands where our logits would."""

    def __init__(self, hf_model: PreTrainedModel) -> None:
        super().__init__()
        self.model = hf_model.requires_grad_(False)
        self._tower = PublishedTower(hf_model)

    def forward(self, pixels_B3HW: Tensor) -> VisionFeatures:
        tokens_BNV, row_BHN = self._tower(pixels_B3HW)
        return VisionFeatures(tokens_BNV=tokens_BNV, cls_scores_BHN=row_BHN, has_cls=True)


def published_vision(scale: Scale, ours: VisionTower) -> PublishedVision:
    """The whole tower with eager maps on our weights, and random ones in what ours leaves out."""
    with made_in(scale):
        whole = AutoModel.from_config(scale.vision_config, attn_implementation="eager", dtype=scale.dtype)
    mine = ours.model.state_dict()
    whole.load_state_dict({**whole.state_dict(), **mine})  # strict: a name that only ours has is an error
    return PublishedVision(whole)


class PublishedSelector(Selector):
    """The loops over images and heads."""

    def __init__(self, num_anchors: int) -> None:
        super().__init__()
        self.num_anchors = num_anchors

    def forward(self, features: VisionFeatures) -> Anchors:
        assert features.cls_scores_BHN is not None
        indices_BT = torch.tensor(select(features.cls_scores_BHN, self.num_anchors), device=features.tokens_BNV.device)
        width = features.tokens_BNV.shape[-1]
        tokens_BTV = features.tokens_BNV.gather(1, indices_BT.unsqueeze(-1).expand(-1, -1, width))
        return Anchors(tokens_BTV=tokens_BTV, indices_BT=indices_BT)


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """A rectangle of samples, padded on the right; prepared on the CPU like ours.

    Attributes:
        input_ids_BL, labels_BL: the samples and what follows them.
        tiles_B3HW: uint8.
        predict_index_Q, targets_Q: the supervised positions of the flattened rectangle and the tokens after them.
    """

    input_ids_BL: Tensor
    labels_BL: Tensor
    tiles_B3HW: Tensor
    predict_index_Q: Tensor
    targets_Q: Tensor

    def to(self, device: torch.device) -> PaddedBatch:
        return PaddedBatch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__slots__))

    def pin_memory(self) -> PaddedBatch:
        return PaddedBatch(*(getattr(self, name).pin_memory() for name in self.__slots__))


def collate_padded(examples: Sequence[Example]) -> PaddedBatch:
    """What LLaVA's collator makes of the samples, and the index of what is supervised in it."""
    ids, _, labels, tiles = pad(examples)
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    index = (following != IGNORE_INDEX).nonzero().squeeze(1)
    return PaddedBatch(ids, labels, tiles, index, following[index])


def padded_loss(model: Any, batch: PaddedBatch, step_supervised: int, *, all_logits: bool) -> Tensor:
    """A padded micro-batch's share of the step's mean token loss: the number `train.loss` gives for the same samples.

    No mask is passed on: padding stands behind each sample, where causality alone hides it, so that the published
    layout gets the fused causal kernel as well.

    Args:
        all_logits: whether the head computes every position, as published, or the supervised ones.
    """
    if all_logits:
        loss = head.loss(_padded_hidden(model, batch), model.get_output_embeddings(), batch.labels_BL)
        return loss * (batch.targets_Q.numel() / step_supervised)
    return cross_entropy_sum(padded_logits(model, batch), batch.targets_Q) / step_supervised


def padded_logits(model: Any, batch: PaddedBatch) -> Tensor:
    """(Q, C) at the supervised positions, in the order of the flat form."""
    hidden_BLD = _padded_hidden(model, batch)
    return model.get_output_embeddings()(hidden_BLD.flatten(0, 1).index_select(0, batch.predict_index_Q))


def _padded_hidden(model: Any, batch: PaddedBatch) -> Tensor:
    embeds = model.get_input_embeddings()(batch.input_ids_BL)
    embeds = fuse(embeds, batch.input_ids_BL, model.encode_images(batch.tiles_B3HW), model.image_token_id)
    return model.language_model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
