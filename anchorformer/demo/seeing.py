"""What lies behind an answer: which patches are anchors, which head took each, and where the answer looked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from anchorformer.answering import Answer
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.demo.choices import follows_anchors
from anchorformer.kernels.attention import TEXT_ATTENTION
from anchorformer.kernels.selection import select_anchors
from anchorformer.modeling import AnchorFormerForConditionalGeneration

WATCHED = "anchorformer_text_watched"
NO_ANCHOR = -1


@dataclass(frozen=True)
class Sight:
    """Tile by tile, P patches in raster order; on the CPU. B tiles.

    Attributes:
        tiles_B3HW: uint8, as the tower takes them.
        heads_BP: the head that took each patch, `NO_ANCHOR` elsewhere; 0 for all anchors of a rule without heads. None
            where tokens are merged and none is chosen.
        num_heads: of the rule; 1 where it asks no single heads.
        attention_BP: share of the answer's attention that goes to each patch's embedding; the rest is text, [CLS] and
            what has no place. None where embeddings do not stand for anchors.
        image_share: of the answer's attention, what goes to all embeddings of the image.
        cls_share: what goes to that of [CLS], where it is an anchor.
    """

    tiles_B3HW: Tensor
    heads_BP: Tensor | None
    num_heads: int
    attention_BP: Tensor | None
    image_share: float
    cls_share: float | None


@torch.no_grad()
def see(model: AnchorFormerForConditionalGeneration, answer: Answer) -> Sight:
    """A second pass over prompt and answer, in which the attention of the answer's positions is computed once more.

    It costs what the first token cost, and Q x S numbers per head of one layer at a time for Q tokens of the answer and
    S positions in all. The answer must have been read to its end, and be about one image.
    """
    inputs: dict[str, Any] = dict(answer.inputs)
    prompt_1S, tiles_B3HW = inputs.pop("input_ids"), inputs["pixel_values"]
    ids_1S = torch.cat([prompt_1S, prompt_1S.new_tensor([answer.ids])], dim=1)
    # Position i says token i + 1: the last one's attention said nothing.
    rows_Q = torch.arange(prompt_1S.shape[1] - 1, ids_1S.shape[1] - 1, device=ids_1S.device)
    watch, looked = _Watch(rows_Q), list[tuple[VisionFeatures, Anchors]]()
    hook = model.selector.register_forward_hook(lambda _, given, out: looked.append((given[0], out)))
    try:
        with _watched(model.language_model):
            inputs["attention_mask"] = torch.ones_like(ids_1S)
            model(input_ids=ids_1S, logits_to_keep=1, watch=watch, **inputs)
    finally:
        hook.remove()
    [(features, anchors)] = looked
    weights_S = torch.stack(watch.layers).mean(0)
    weights_R = weights_S[ids_1S[0] == model.image_token_id]
    weights_VT = _by_view(weights_R, len(anchors.tokens_BTV), anchors.sizes)
    patches = model.vision_tower.num_tokens - model.vision_tower.has_cls
    heads_VN, num_heads = heads_of(features, anchors)
    attention_VN = None
    if anchors.indices_BT is not None and follows_anchors(model):
        attention_VN = weights_VT.new_zeros(features.tokens_BNV.shape[:2]).scatter_add_(
            1, anchors.indices_BT, weights_VT
        )

    def by_tile(x_VN: Tensor | None) -> Tensor | None:
        return None if x_VN is None else x_VN[:, int(features.has_cls) :].reshape(-1, patches).cpu()

    keeps_cls = features.has_cls and heads_VN is not None and bool((heads_VN[:, 0] != NO_ANCHOR).any())
    return Sight(
        tiles_B3HW.cpu(), by_tile(heads_VN), num_heads, by_tile(attention_VN), float(weights_R.sum()),
        float(attention_VN[:, 0].sum()) if attention_VN is not None and keeps_cls else None,
    )  # fmt: skip


def _by_view(weights_R: Tensor, views: int, sizes: Sequence[int] | None) -> Tensor:
    """Something of each embedding as (views, T); rows of fewer embeddings end with zeros."""
    if sizes is None:
        return weights_R.view(views, -1)
    return pad_sequence(weights_R.split(list(sizes)), batch_first=True)


def heads_of(features: VisionFeatures, anchors: Anchors) -> tuple[Tensor | None, int]:
    """The head that took each token, (V, N) as `Sight.heads_BP` has it, and how many heads took part."""
    chosen_VT, scores_VHN = anchors.indices_BT, features.cls_scores_BHN
    if chosen_VT is None:
        return None, 1
    heads_VN = torch.full(features.tokens_BNV.shape[:2], NO_ANCHOR, device=chosen_VT.device)
    if scores_VHN is None or not torch.equal(select_anchors(scores_VHN, chosen_VT.shape[1]), chosen_VT):
        return heads_VN.scatter_(1, chosen_VT, 0), 1
    # What the first heads take does not depend on those behind them.
    heads = scores_VHN.shape[1]
    per_head = (chosen_VT.shape[1] - 1) // heads
    for count in range(heads, 0, -1):
        heads_VN.scatter_(1, select_anchors(scores_VHN[:, :count], 1 + count * per_head), count - 1)
    return heads_VN, heads


class _Watch:
    """Collects where some positions look: of each layer, (S,) in fp32, the mean over heads and positions."""

    def __init__(self, rows_Q: Tensor) -> None:
        self.rows_Q = rows_Q
        self.layers: list[Tensor] = []

    def look(self, query_1HSK: Tensor, key_1hSK: Tensor, mask: Tensor | None, scale: float) -> None:
        keys_1HSK = key_1hSK.repeat_interleave(query_1HSK.shape[1] // key_1hSK.shape[1], 1).float()
        logits_1HQS = query_1HSK[:, :, self.rows_Q].float() @ keys_1HSK.mT * scale
        if mask is None:
            sees_QS = torch.arange(keys_1HSK.shape[2], device=keys_1HSK.device) <= self.rows_Q[:, None]
        else:
            sees_QS = mask[:, :, self.rows_Q]
        self.layers.append(logits_1HQS.masked_fill(~sees_QS, -torch.inf).softmax(-1).mean((0, 1, 2)))


@contextmanager
def _watched(language_model: nn.Module) -> Iterator[None]:
    model: Any = language_model
    model.set_attn_implementation(WATCHED)
    try:
        yield
    finally:
        model.set_attn_implementation(TEXT_ATTENTION)


def _watched_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, watch: _Watch | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The ordinary attention, with whoever watches told of queries and keys."""
    if watch is not None:
        watch.look(query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    out: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS[TEXT_ATTENTION](
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return out


AttentionInterface.register(WATCHED, _watched_forward)
AttentionMaskInterface.register(WATCHED, ALL_MASK_ATTENTION_FUNCTIONS[TEXT_ATTENTION])
