"""Attention of all parts behind one seam: rectangles, and the language model in its two forms, flat or padded.

Shapes: B images or rows, S query positions, T key positions, H query heads, h key heads (h divides H), K head width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from anchorformer.errors import UserError
from anchorformer.kernels import varlen
from anchorformer.kernels.backend import Backend, choose

TEXT_ATTENTION = "anchorformer_text"

FLAT_MASK = torch.empty(0, 0, 0, 0)
"""The mask of the flat form: none, said in four dimensions, which transformers hands through as they are.

For None it would look for borders in the position ids, with the host waiting for the device, in every forward.
"""

SCORES_AT_A_TIME = 4 << 20
"""Bytes of scores that `matmul` holds where no backward follows: they stay in the cache.

Measured at 577 to 5185 positions on the machine of `LARGEST_MATMUL_POSITIONS`: 4 MiB was the fastest of 1 to 4.
"""

VARLEN = {Backend.flash_attn: varlen.flash_attn, Backend.varlen: varlen.torch_varlen}


def attend(
    query_BHSK: Tensor,
    key_BhTK: Tensor,
    value_BhTK: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    backend: Backend | None = None,
) -> Tensor:
    """softmax(q k^T scale) v for rectangles.

    Args:
        causal: query i sees keys 0..i; later keys (the unused end of a static cache) are seen by none.
        mask: bool, broadcastable to (B, H, S, T), True = may attend; not together with `causal`.
        backend: `matmul` or `sdpa` where a test or a bench asks for one; otherwise chosen.

    Returns:
        (B, S, H, K), contiguous: the layout that the output projection reads.
    """
    query_BHSK, key_BhTK, value_BhTK = _one_dtype(query_BHSK, key_BhTK, value_BhTK)
    longest = max(query_BHSK.shape[2], key_BhTK.shape[2])
    in_blocks = mask is None and _is_forward_only(query_BHSK, key_BhTK, value_BhTK, dropout)
    backend = backend or choose(
        query_BHSK.device, query_BHSK.dtype, longest, query_BHSK.shape[3], flat=False, in_blocks=in_blocks
    )
    if backend is Backend.matmul:
        if in_blocks:
            return _matmul_in_blocks(query_BHSK, key_BhTK, value_BhTK, scale, causal)
        return _matmul(query_BHSK, key_BhTK, value_BhTK, scale, causal, mask, dropout)
    groups = query_BHSK.shape[1] // key_BhTK.shape[1]
    if groups > 1 and not _shares_key_heads(query_BHSK, key_BhTK, causal, mask):
        key_BhTK, value_BhTK = key_BhTK.repeat_interleave(groups, 1), value_BhTK.repeat_interleave(groups, 1)
        groups = 1
    out_BHSK = F.scaled_dot_product_attention(
        query_BHSK,
        key_BhTK,
        value_BhTK,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=groups > 1,
    )
    return out_BHSK.transpose(1, 2).contiguous()


def attend_flat(
    query_1HSK: Tensor,
    key_1hSK: Tensor,
    value_1hSK: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention inside each of the samples that lie end to end in one row; nothing crosses a border.

    Args:
        cu_seqlens: int32 (samples + 1,), borders of the samples; its last entry is S.
        max_seqlen: longest sample, in positions.

    Returns:
        (1, S, H, K).
    """
    query_1HSK, key_1hSK, value_1hSK = _one_dtype(query_1HSK, key_1hSK, value_1hSK)
    positions, width = query_1HSK.shape[2:]
    in_blocks = _is_forward_only(query_1HSK, key_1hSK, value_1hSK, dropout)
    backend = choose(query_1HSK.device, query_1HSK.dtype, max_seqlen, width, flat=True, in_blocks=in_blocks)
    if backend in VARLEN:
        query_SHK, key_ShK, value_ShK = (x[0].transpose(0, 1) for x in (query_1HSK, key_1hSK, value_1hSK))
        return VARLEN[backend](
            query_SHK, key_ShK, value_ShK, scale=scale, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, dropout=dropout
        ).unsqueeze(0)
    samples = cu_seqlens.numel() - 1
    if samples * max_seqlen == positions:  # all samples equally long: the row already is the rectangle
        to_rectangle = back = None
    else:
        to_rectangle, back = rectangle_indices(cu_seqlens.long(), max_seqlen, positions)

    def rectangle(x_1HSK: Tensor) -> Tensor:
        x_SHK = x_1HSK[0].transpose(0, 1)
        rows = x_SHK if to_rectangle is None else x_SHK.index_select(0, to_rectangle)
        return rows.unflatten(0, (samples, max_seqlen)).transpose(1, 2)

    # Padding stands after each sample, so causality alone hides it from every real query, and no mask is needed.
    out = attend(
        rectangle(query_1HSK),
        rectangle(key_1hSK),
        rectangle(value_1hSK),
        scale=scale,
        causal=True,
        dropout=dropout,
        backend=backend,
    ).flatten(0, 1)
    return (out if back is None else out.index_select(0, back)).unsqueeze(0)


def _text_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature for causal language models: flat with cu_seq_lens_q, padded without."""
    _refuse_unknown_rules(kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cu_seq_lens_q is None:
        causal = attention_mask is None and query.shape[2] > 1
        return attend(query, key, value, scale=scale, causal=causal, mask=attention_mask, dropout=dropout), None
    is_masked = attention_mask is not None and attention_mask.numel() > 0
    is_row = query.shape[0] == 1 and query.shape[2] == key.shape[2] and max_length_q is not None
    is_windowed = sliding_window is not None and max_length_q is not None and sliding_window < max_length_q
    if is_masked or is_windowed or not is_row:
        raise UserError(
            "flat attention was called with something that only fits the padded form",
            found=f"mask={is_masked}, rows={query.shape[0]}, {query.shape[2]} queries, {key.shape[2]} keys, "
            f"max_length_q={max_length_q}, sliding_window={sliding_window}",
            expected="one row, no mask, no cache, no sliding window shorter than a sample, and its longest sample",
            remedy="pass either cu_seqlens or a 2-D attention_mask with a cache, never both",
        )
    out = attend_flat(
        query,
        key,
        value,
        scale=scale,
        cu_seqlens=cu_seq_lens_q,
        max_seqlen=int(cast(int, max_length_q)),
        dropout=dropout,
    )
    return out, None


def _text_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask signature: None where plain causality says it all, else a bool mask (B, 1, S, T).

    Where transformers finds packed samples by restarting position ids, it asks for the mask; the flat form, which names
    its borders itself, never comes here.
    """
    square = q_length == kv_length
    window = local_size is not None and local_size < kv_length
    is_packed = not kwargs.get("allow_is_causal_skip", True)
    if attention_mask is None and square and not window and not use_vmap and not is_packed:
        return None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        **kwargs,
    )


def _refuse_unknown_rules(kwargs: dict[str, Any]) -> None:
    rules = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if rules:
        raise UserError(
            "this language model's attention has rules that are not implemented here",
            found=", ".join(rules),
            expected="plain causal attention, as in Llama, Vicuna, Mistral or Qwen2",
            remedy="choose a language model without them",
        )


def _matmul(
    query_BHSK: Tensor,
    key_BhTK: Tensor,
    value_BhTK: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None,
    dropout: float,
) -> Tensor:
    batch, heads, num_queries, width = query_BHSK.shape
    key_heads, num_keys = key_BhTK.shape[1:3]
    # The query heads that share a key head become more rows of one product, so that keys are never repeated.
    query = (query_BHSK * scale).reshape(batch * key_heads, -1, width)
    scores = torch.bmm(query, key_BhTK.reshape(batch * key_heads, num_keys, width).transpose(1, 2))
    scores = scores.view(batch, heads, num_queries, num_keys)
    if causal:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    out = torch.bmm(
        weights.reshape(batch * key_heads, -1, num_keys), value_BhTK.reshape(batch * key_heads, num_keys, width)
    )
    return out.view(batch, heads, num_queries, width).transpose(1, 2).contiguous()


def _matmul_in_blocks(query_BHSK: Tensor, key_BhTK: Tensor, value_BhTK: Tensor, scale: float, causal: bool) -> Tensor:
    """`_matmul` without a graph: whole heads, or rows of one, as many at a time as `SCORES_AT_A_TIME` holds."""
    batch, heads, num_queries, width = query_BHSK.shape
    key_heads, num_keys = key_BhTK.shape[1:3]
    query = (query_BHSK * scale).reshape(batch * key_heads, -1, width)
    key = key_BhTK.reshape(batch * key_heads, num_keys, width).transpose(1, 2)
    value = value_BhTK.reshape(batch * key_heads, num_keys, width)
    rows = query.shape[1]
    rows_at_a_time = max(1, SCORES_AT_A_TIME // (num_keys * query.element_size()))
    heads_at_a_time = max(1, rows_at_a_time // rows)
    hidden = None
    if causal:
        seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril()
        hidden = ~seen.repeat(rows // num_queries, 1)
    out = torch.empty_like(query)
    for head in range(0, len(query), heads_at_a_time):
        some = slice(head, head + heads_at_a_time)
        for row in range(0, rows, rows_at_a_time):
            block = slice(row, row + rows_at_a_time)
            scores = torch.bmm(query[some, block], key[some])
            if hidden is not None:
                scores.masked_fill_(hidden[block], torch.finfo(scores.dtype).min)
            out[some, block] = torch.bmm(scores.softmax(-1), value[some])
    return out.view(batch, heads, num_queries, width).transpose(1, 2).contiguous()


def _is_forward_only(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether nothing of this call is kept for a backward, or drawn."""
    needs_graph = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return not needs_graph and dropout == 0


def _shares_key_heads(query_BHSK: Tensor, key_BhTK: Tensor, causal: bool, mask: Tensor | None) -> bool:
    """Whether torch can run this case fused with fewer key heads than query heads.

    On CUDA only its flash kernel can, and that takes half precision, heads up to 256, no mask, causality for squares
    only, and a card of 2020 or newer; anything else with shared key heads would silently build the matrix of scores.
    """
    if not query_BHSK.is_cuda:
        return True
    if query_BHSK.dtype not in (torch.bfloat16, torch.float16) or mask is not None:
        return False
    if query_BHSK.shape[3] > varlen.WIDEST_HEAD or torch.cuda.get_device_capability(query_BHSK.device) < (8, 0):
        return False
    return not (causal and query_BHSK.shape[2] != key_BhTK.shape[2])


def rectangle_indices(cu_seqlens: Tensor, max_seqlen: int, positions: int) -> tuple[Tensor, Tensor]:
    """Where each cell of the (samples, max_seqlen) rectangle comes from, and where each position went; no host sync."""
    steps = torch.arange(max_seqlen, device=cu_seqlens.device)
    to_rectangle = (cu_seqlens[:-1, None] + steps).clamp_(max=positions - 1).flatten()
    where = torch.arange(positions, device=cu_seqlens.device)
    sample = torch.searchsorted(cu_seqlens[1:], where, right=True)
    return to_rectangle, sample * max_seqlen + where - cu_seqlens[sample]


def _one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast queries and keys arrive in fp32 from the rotary product while values are already half."""
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(x.to(dtype) for x in tensors)
    return tensors


AttentionInterface.register(TEXT_ATTENTION, _text_forward)
AttentionMaskInterface.register(TEXT_ATTENTION, _text_mask)
