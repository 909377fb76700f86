"""The corridors between the rooms: the few shapes in which data is handed from one room to the next.

Shape suffixes, here and everywhere: B images (tiles), N visual tokens ([CLS] counted), P patches, T anchors ([CLS]
counted), S packed text positions, Q supervised positions, H heads, K head width, D width, V vision width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not supervised."""


@dataclass(frozen=True, slots=True)
class VisionNeeds:
    """What a selector reads from the vision tower; the tower taps exactly this and runs no layer that it does not need.

    Layers are indices into the tower's hidden states as Hugging Face counts them (1 = output of the first block, -2 =
    of the last but one); an attention row belongs to the block that produces the hidden state.

    Attributes:
        layer: the hidden state that tokens and scores are read from.
        cls_scores: whether the fp32 attention logits of the [CLS] query in that block are needed, head by head.
        cls_attention_from: first layer whose [CLS] attention, after softmax and averaged over heads, is needed; the
            layers from it to `layer` are tapped. None: none.
        received: whether the mean attention that each token of that block receives is needed.
        qk: the layers whose block's keys, and [CLS] query where there is one, are needed, each at most once.
        final: whether the last block's output behind the tower's own last norm is needed; every block runs then.
        image_key: whether a number that stands for the image's content is needed.
    """

    layer: int = -2
    cls_scores: bool = False
    cls_attention_from: int | None = None
    received: bool = False
    qk: tuple[int, ...] = ()
    final: bool = False
    image_key: bool = False

    @property
    def cls(self) -> bool:
        """Whether only a tower with [CLS] can serve this."""
        return self.cls_scores or self.cls_attention_from is not None


@dataclass(frozen=True)  # no slots: DeepSpeed ZeRO-3 reads what modules return through vars()
class VisionFeatures:
    """What the vision tower hands on.

    Attributes:
        tokens_BNV: hidden states of the tapped layer, no final norm; [CLS] first where the tower has one, register
            tokens removed, then the patches in raster order.
        cls_scores_BHN: fp32 logits (q_cls . k / sqrt(K), before softmax) over the same N tokens, or None where the
            selector did not ask for them.
        has_cls: whether token 0 is [CLS].
        cls_attention_BLN: fp32 attention of the [CLS] query over the same N tokens, after softmax, averaged over heads,
            for the L layers that were asked for, the first one first; registers had their share and are left out.
        received_BN: fp32 attention that each of the N tokens receives, after softmax, averaged over heads and over all
            queries, itself and registers counted.
        query_BLV: query of [CLS] in the L blocks of `qk`, in their order, heads side by side; None without [CLS].
        keys_BLNV: keys of the same N tokens in these blocks, heads side by side; neither carries a gradient.
        final_BNV: the same N tokens behind the last block and the tower's last norm.
        image_key_B: int64, 0 to 2**32 - 1, a function of the image alone: the same in every batch, precision and place.
        sizes: where images of different numbers of tiles are views of different numbers of tokens, those numbers, on
            the host; what lies behind them is padding. None: all N are real.
        mask_BN: bool, whether a token is real; None with `sizes`.
        chosen_BN: bool, the tokens that a selector with a number of its own for every image has chosen, where that has
            been done already; None: it is still to choose.
        num_chosen: how many those are of each image, on the host; with `chosen_BN` from a feature cache.
    """

    tokens_BNV: Tensor
    cls_scores_BHN: Tensor | None
    has_cls: bool
    cls_attention_BLN: Tensor | None = None
    received_BN: Tensor | None = None
    query_BLV: Tensor | None = None
    keys_BLNV: Tensor | None = None
    final_BNV: Tensor | None = None
    image_key_B: Tensor | None = None
    sizes: tuple[int, ...] | None = None
    mask_BN: Tensor | None = None
    chosen_BN: Tensor | None = None
    num_chosen: tuple[int, ...] | None = None

    @property
    def patches_BPV(self) -> Tensor:
        """The tokens without [CLS], (B, P, V)."""
        return self.tokens_BNV[:, int(self.has_cls) :]

    def map(self, change: Callable[[Tensor], Tensor]) -> VisionFeatures:
        """The same features with each tensor changed, such as moved to another device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed)

    def blank(self, images: int) -> VisionFeatures:
        """Features of as many images of nothing, in these shapes; where tokens are chosen already, one of each."""
        blank = self.map(lambda tensor: tensor.new_zeros(images, *tensor.shape[1:]))
        if blank.chosen_BN is None:
            return blank
        blank.chosen_BN[:, -1] = True
        return replace(blank, num_chosen=(1,) * images)


@dataclass(frozen=True)  # no slots: DeepSpeed ZeRO-3 reads what modules return through vars()
class Anchors:
    """What a selector hands to the connector: the queries, and where they came from.

    Attributes:
        tokens_BTV: the anchors, ascending by position in the image.
        indices_BT: their indices into N (0 = [CLS] where the tower has one), or None for merging selectors.
        sizes: where images have different numbers of anchors, those numbers, on the host; what lies behind them repeats
            an image's last anchor. None: every image has T.
    """

    tokens_BTV: Tensor
    indices_BT: Tensor | None
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One record after the processor: ids and labels with every placeholder expanded, images as tiles.

    Attributes:
        sample_id: names the record in logs and errors (`source/record id`).
        input_ids_S: int64; an image stands as T times the image token id, or as often as `token_counts` says.
        labels_S: int64; the id itself where supervised, IGNORE_INDEX elsewhere. Not shifted.
        tiles_B3HW: uint8, (0, 3, H, W) for a text-only record.
        tile_counts: tiles of each image; None where every image is one tile.
        token_counts: embeddings that each tile stands for in the ids, where tiles have different numbers.
    """

    sample_id: str
    input_ids_S: Tensor
    labels_S: Tensor
    tiles_B3HW: Tensor
    tile_counts: tuple[int, ...] | None = None
    token_counts: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: samples end to end in one row, no padding; everything a step needs, computed on CPU.

    Attributes:
        input_ids_S: int64, all samples after each other.
        position_ids_S: int64, restarting at 0 with each sample.
        cu_seqlens: int32 (samples + 1,), borders of the samples in S.
        max_seqlen: longest sample, in positions.
        tiles_B3HW: uint8, all images in order of their placeholders, tile after tile; (0, 3, H, W) where no sample has
            one.
        tile_counts: tiles of each image, on the host: shapes follow from them; None where every image is one tile.
        token_counts: embeddings that each tile stands for in the ids, where tiles have different numbers.
        predict_index_Q: int64 positions in S whose *next* token is supervised.
        targets_Q: int64, that next token.
        sample_ids: names of the samples; empty for a micro-batch that only keeps ranks in step.
        num_skipped: samples left out because their image could not be read (`on_bad_image=skip`).
        features: what the vision tower says of the tiles, where it is known beforehand; None runs it.
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
    tile_counts: tuple[int, ...] | None = None
    token_counts: tuple[int, ...] | None = None
    features: VisionFeatures | None = None

    @property
    def num_supervised(self) -> int:
        return self.targets_Q.numel()

    @property
    def num_tokens(self) -> int:
        return self.input_ids_S.numel()

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device` (asynchronous from pinned memory)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's DataLoader calls it by this name."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {name: getattr(self, name) for name in self.__slots__}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        if self.features is not None:
            changed["features"] = self.features.map(change)
        return replace(self, **changed)
