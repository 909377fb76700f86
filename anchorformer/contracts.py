"""The corridors between the rooms: the few shapes in which data is handed from one room to the next.

Shape suffixes, here and everywhere: B images (tiles), N visual tokens ([CLS] counted), P patches, T anchors ([CLS]
counted), S packed text positions, Q supervised positions, H heads, K head width, D width, V vision width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not supervised."""


@dataclass(frozen=True, slots=True)
class VisionNeeds:
    """What a selector reads from the vision tower; the tower taps exactly this and runs no layer beyond it.

    Attributes:
        layer: index into the tower's hidden states as Hugging Face counts them (-2 = output of the last but one
            block); tokens and [CLS] row both belong to the block that produces it.
        cls_scores: whether the fp32 attention logits of the [CLS] query in that block are needed.
    """

    layer: int = -2
    cls_scores: bool = False


@dataclass(frozen=True)  # no slots: DeepSpeed ZeRO-3 reads what modules return through vars()
class VisionFeatures:
    """What the vision tower hands on.

    Attributes:
        tokens_BNV: hidden states of the tapped layer, no final norm; [CLS] first where the tower has one, register
            tokens removed, then the patches in raster order.
        cls_scores_BHN: fp32 logits (q_cls . k / sqrt(K), before softmax) over the same N tokens, or None where the
            selector did not ask for them.
        has_cls: whether token 0 is [CLS].
    """

    tokens_BNV: Tensor
    cls_scores_BHN: Tensor | None
    has_cls: bool


@dataclass(frozen=True)  # no slots: DeepSpeed ZeRO-3 reads what modules return through vars()
class Anchors:
    """What a selector hands to the connector: the queries, and where they came from.

    Attributes:
        tokens_BTV: the anchors, ascending by position in the image.
        indices_BT: their indices into N (0 = [CLS] where the tower has one), or None for merging selectors.
    """

    tokens_BTV: Tensor
    indices_BT: Tensor | None


@dataclass(frozen=True, slots=True)
class Example:
    """One record after the processor: ids and labels with every placeholder expanded, images as tiles.

    Attributes:
        sample_id: names the record in logs and errors (`source/record id`).
        input_ids_S: int64; an image stands as T times the image token id.
        labels_S: int64; the id itself where supervised, IGNORE_INDEX elsewhere. Not shifted.
        tiles_B3HW: uint8, (0, 3, H, W) for a text-only record.
    """

    sample_id: str
    input_ids_S: Tensor
    labels_S: Tensor
    tiles_B3HW: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: samples end to end in one row, no padding; everything a step needs, computed on CPU.

    Attributes:
        input_ids_S: int64, all samples after each other.
        position_ids_S: int64, restarting at 0 with each sample.
        cu_seqlens: int32 (samples + 1,), borders of the samples in S.
        max_seqlen: longest sample, in positions.
        tiles_B3HW: uint8, all images in order of their placeholders; (0, 3, H, W) where no sample has one.
        predict_index_Q: int64 positions in S whose *next* token is supervised.
        targets_Q: int64, that next token.
        sample_ids: names of the samples; empty for a micro-batch that only keeps ranks in step.
        num_skipped: samples left out because their image could not be read (`on_bad_image=skip`).
    """

    input_ids_S: Tensor
    position_ids_S: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    tiles_B3HW: Tensor
    predict_index_Q: Tensor
    targets_Q: Tensor
    sample_ids: tuple[str, ...]
    num_skipped: int = 0

    @property
    def num_supervised(self) -> int:
        return self.targets_Q.numel()

    @property
    def num_tokens(self) -> int:
        return self.input_ids_S.numel()

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device` (asynchronous from pinned memory)."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in self.__slots__
            if isinstance(getattr(self, name), Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's DataLoader calls it by this name."""
        pinned = {
            name: getattr(self, name).pin_memory() for name in self.__slots__ if isinstance(getattr(self, name), Tensor)
        }
        return replace(self, **pinned)
