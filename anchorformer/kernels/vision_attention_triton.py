"""Attention of a ViT layer and its [CLS] row of logits in one Triton launch: forward only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)

BLOCK = 64
"""Queries and keys per tile. Small tiles leave room for four programs on a multiprocessor, and patches come in 64s."""


@triton.jit
def attention_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    out: tl.tensor,
    scores: tl.tensor,
    query_image_stride: tl.tensor,
    query_head_stride: tl.tensor,
    query_token_stride: tl.tensor,
    query_width_stride: tl.tensor,
    key_image_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_token_stride: tl.tensor,
    key_width_stride: tl.tensor,
    value_image_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_token_stride: tl.tensor,
    value_width_stride: tl.tensor,
    num_heads: tl.tensor,
    num_tokens: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Program 0 of a head is the [CLS] query over all keys, in fp32 sums; the others are BLOCK_M patches each.

    As a key [CLS] stands apart too: every softmax begins with it. What is left is the grid of patches, which mostly
    fills whole tiles (576 = 9 x 64), where 577 tokens would open one more for a single key. WHOLE: it does.
    """
    head = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    query += image * query_image_stride + head * query_head_stride
    key += image * key_image_stride + head * key_head_stride
    value += image * value_image_stride + head * value_head_stride
    out += (image * num_tokens * num_heads + head) * width
    out_token_stride = num_heads * width
    lane = tl.arange(0, BLOCK_K)
    in_width = lane < width

    if tl.program_id(0) == 0:
        scores += (image * num_heads + head) * num_tokens
        q_K = tl.load(query + lane * query_width_stride, mask=in_width, other=0.0).to(tl.float32)
        # Every place of the tile keeps a softmax of its own over the keys that come by; they are joined at the end.
        top_N = tl.full([BLOCK_N], -1e30, tl.float32)
        total_N = tl.zeros([BLOCK_N], tl.float32)
        out_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, num_tokens, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            mask = (token < num_tokens)[:, None] & in_width[None, :]
            k_NK = tl.load(
                key + token[:, None] * key_token_stride + lane[None, :] * key_width_stride, mask=mask, other=0.0
            )
            v_NK = tl.load(
                value + token[:, None] * value_token_stride + lane[None, :] * value_width_stride, mask=mask, other=0.0
            )
            score_N = tl.sum(k_NK.to(tl.float32) * q_K[None, :], 1) * scale
            tl.store(scores + token, score_N, mask=token < num_tokens)
            logit_N = tl.where(token < num_tokens, score_N * LOG2_E, float("-inf"))
            new_top_N = tl.maximum(top_N, logit_N)
            shrink_N = tl.exp2(top_N - new_top_N)
            weight_N = tl.exp2(logit_N - new_top_N)
            total_N = total_N * shrink_N + weight_N
            out_NK = out_NK * shrink_N[:, None] + weight_N[:, None] * v_NK.to(tl.float32)
            top_N = new_top_N
        shrink_N = tl.exp2(top_N - tl.max(top_N, 0))
        total = tl.sum(total_N * shrink_N, 0)
        out_K = tl.sum(out_NK * shrink_N[:, None], 0) / total
        tl.store(out + lane, out_K.to(out.dtype.element_ty), mask=in_width)
    else:
        row = 1 + (tl.program_id(0) - 1) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = (row < num_tokens)[:, None] & in_width[None, :]
        q_MK = tl.load(
            query + row[:, None] * query_token_stride + lane[None, :] * query_width_stride, mask=row_mask, other=0.0
        )
        k_K = tl.load(key + lane * key_width_stride, mask=in_width, other=0.0).to(tl.float32)
        v_K = tl.load(value + lane * value_width_stride, mask=in_width, other=0.0).to(tl.float32)
        to_log2 = scale * LOG2_E
        top_M = tl.sum(q_MK.to(tl.float32) * k_K[None, :], 1) * to_log2
        total_M = tl.full([BLOCK_M], 1.0, tl.float32)
        out_MK = tl.zeros([BLOCK_M, BLOCK_K], tl.float32) + v_K[None, :]
        for start in range(1, num_tokens, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            keys = key + token[None, :] * key_token_stride + lane[:, None] * key_width_stride
            values = value + token[:, None] * value_token_stride + lane[None, :] * value_width_stride
            if WHOLE:
                k_KN = tl.load(keys)
                v_NK = tl.load(values)
            else:
                inside = token < num_tokens
                k_KN = tl.load(keys, mask=inside[None, :] & in_width[:, None], other=0.0)
                v_NK = tl.load(values, mask=inside[:, None] & in_width[None, :], other=0.0)
            score_MN = tl.dot(q_MK, k_KN)
            if not WHOLE:
                score_MN = tl.where((token < num_tokens)[None, :], score_MN, float("-inf"))
            new_top_M = tl.maximum(top_M, tl.max(score_MN, 1) * to_log2)
            shrink_M = tl.exp2(top_M - new_top_M)
            weight_MN = tl.exp2(tl.fma(score_MN, to_log2, -new_top_M[:, None]))
            total_M = total_M * shrink_M + tl.sum(weight_MN, 1)
            out_MK = tl.dot(weight_MN.to(v_NK.dtype), v_NK, out_MK * shrink_M[:, None])
            top_M = new_top_M
        tl.store(
            out + row[:, None] * out_token_stride + lane[None, :],
            (out_MK / total_M[:, None]).to(out.dtype.element_ty),
            mask=row_mask,
        )


def launch(query_BHNK: Tensor, key_BHNK: Tensor, value_BHNK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(B, N, H, K) in the inputs' dtype, and (B, H, N) fp32; any strides, half precision.

    Raises:
        ValueError: fp32, which the matrix units would round to TF32; or a scale that is not above 0, since maxima are
            taken before scaling.
    """
    if query_BHNK.dtype is torch.float32 or scale <= 0:
        raise ValueError(f"half precision and a scale above 0, not {query_BHNK.dtype} and {scale}")
    batch, heads, tokens, width = query_BHNK.shape
    out_BNHK = query_BHNK.new_empty(batch, tokens, heads, width)
    scores_BHN = torch.empty(batch, heads, tokens, dtype=torch.float32, device=query_BHNK.device)
    block_k = max(16, triton.next_power_of_2(width))
    attention_kernel[(1 + triton.cdiv(tokens - 1, BLOCK), heads, batch)](
        query_BHNK,
        key_BHNK,
        value_BHNK,
        out_BNHK,
        scores_BHN,
        *query_BHNK.stride(),
        *key_BHNK.stride(),
        *value_BHNK.stride(),
        heads,
        tokens,
        width,
        scale,
        WHOLE=(tokens - 1) % BLOCK == 0 and block_k == width,
        BLOCK_M=BLOCK,
        BLOCK_N=BLOCK,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    return out_BNHK, scores_BHN
