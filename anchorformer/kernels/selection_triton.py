"""The anchor rule as one Triton program per image."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def select_kernel(
    scores: tl.tensor,
    indices: tl.tensor,
    image_stride: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    num_heads: tl.tensor,
    per_head: tl.tensor,
    num_patches: tl.tensor,
    num_anchors: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """All heads of one image, whose patches stay in registers from the first head to the last.

    Among a head's keys the `per_head`-th largest is searched bit by bit from the top: a bit stays set if at least
    `per_head` free keys reach the number built so far. The search ends as soon as exactly `per_head` reach it.
    """
    image = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK)
    inside = patch < num_patches
    row = scores + image * image_stride + (patch + 1) * token_stride
    free = inside
    upcoming = tl.load(row, mask=inside, other=0.0)
    for head in range(num_heads):
        score = upcoming.to(tl.float32)
        # The next head's scores travel while this head's are searched.
        row += head_stride
        upcoming = tl.load(row, mask=inside & (head + 1 < num_heads), other=0.0)

        score = tl.where(score == 0.0, 0.0, score)  # -0.0 ranks like 0.0
        bits = score.to(tl.uint32, bitcast=True)
        key = bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000)  # unsigned, in the order of the scores
        key = tl.where(free, tl.maximum(key, 1), 0)  # 0: taken, or behind the last patch

        threshold = tl.full([], 0, tl.uint32)
        step = tl.full([], 0x80000000, tl.uint32)
        reached = num_patches
        while (step > 0) & (reached != per_head):
            candidate = threshold | step
            count = tl.sum((key >= candidate).to(tl.int32), 0)
            reached = tl.where(count >= per_head, count, reached)
            threshold = tl.where(count >= per_head, candidate, threshold)
            step = step >> 1

        if reached == per_head:
            free = free & (key < threshold)
        else:  # more patches tie for the last seats than there are seats: the lower ones sit down
            tied = key == threshold
            seats = per_head - tl.sum((key > threshold).to(tl.int32), 0)
            free = free & ((key < threshold) | (tied & (tl.cumsum(tied.to(tl.int32), 0) > seats)))

    taken = inside & ~free
    place = tl.cumsum(taken.to(tl.int32), 0)  # 1 for the lowest: place 0 is [CLS]
    out = indices + image * num_anchors
    tl.store(out, tl.full([], 0, tl.int64))
    tl.store(out + place, (patch + 1).to(tl.int64), mask=taken)


def block_and_warps(num_patches: int) -> tuple[int, int]:
    """Patches that a program holds, and its warps: few, since they meet at a barrier for every count, yet no spills."""
    block = triton.next_power_of_2(num_patches)
    return block, max(1, block // 512, min(block // 256, 4))


def launch(scores_BHN: Tensor, num_anchors: int) -> Tensor:
    """(B, T) int64 from (B, H, N) scores of any strides and float dtype; H divides T-1."""
    batch, heads, tokens = scores_BHN.shape
    indices_BT = torch.empty(batch, num_anchors, dtype=torch.int64, device=scores_BHN.device)
    block, warps = block_and_warps(tokens - 1)
    select_kernel[(batch,)](
        scores_BHN,
        indices_BT,
        *scores_BHN.stride(),
        heads,
        (num_anchors - 1) // heads,
        tokens - 1,
        num_anchors,
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return indices_BT
