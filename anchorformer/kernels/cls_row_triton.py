"""The [CLS] row of attention logits in Triton, read from strided queries and keys as they lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 128
"""Keys per program: at 577 tokens and 16 heads one image already fills 80 programs."""


@triton.jit
def row_kernel(
    query: tl.tensor,
    key: tl.tensor,
    scores: tl.tensor,
    query_image_stride: tl.tensor,
    query_head_stride: tl.tensor,
    query_width_stride: tl.tensor,
    key_image_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_token_stride: tl.tensor,
    key_width_stride: tl.tensor,
    num_heads: tl.tensor,
    num_tokens: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One head of one image over BLOCK_N keys; products and sums in fp32, no matrix unit."""
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK_K)
    query += image * query_image_stride + head * query_head_stride
    key += image * key_image_stride + head * key_head_stride
    q_K = tl.load(query + lane * query_width_stride, mask=lane < width, other=0.0).to(tl.float32)
    k_NK = tl.load(
        key + token[:, None].to(tl.int64) * key_token_stride + lane[None, :] * key_width_stride,
        mask=(token < num_tokens)[:, None] & (lane < width)[None, :],
        other=0.0,
    ).to(tl.float32)
    score_N = tl.sum(k_NK * q_K[None, :], 1) * scale
    tl.store(scores + (image * num_heads + head) * num_tokens + token, score_N, mask=token < num_tokens)


def launch(query_BHNK: Tensor, key_BHNK: Tensor, scale: float) -> Tensor:
    """(B, H, N) fp32; any strides, any float dtype."""
    batch, heads, tokens, width = key_BHNK.shape
    scores_BHN = torch.empty(batch, heads, tokens, dtype=torch.float32, device=key_BHNK.device)
    row_kernel[(triton.cdiv(tokens, BLOCK_N), heads, batch)](
        query_BHNK,
        key_BHNK,
        scores_BHN,
        query_BHNK.stride(0),
        query_BHNK.stride(1),
        query_BHNK.stride(3),
        *key_BHNK.stride(),
        heads,
        tokens,
        width,
        scale,
        BLOCK_K=triton.next_power_of_2(width),
        BLOCK_N=BLOCK_N,
        num_warps=4,
        # Named, because Triton's default is about to change and the rounding of the scores must not change with it.
        enable_fp_fusion=False,
    )
    return scores_BHN
