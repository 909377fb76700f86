"""Cross-entropy of many classes without fp32 copies of the logits.

Shapes: Q supervised positions, C classes (the vocabulary).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 24
"""Logits that are turned into fp32 at a time: 64 MB."""


def cross_entropy_sum(logits_QC: Tensor, targets_Q: Tensor) -> Tensor:
    """Sum over positions of logsumexp(logits) - logits[target], computed in fp32 whatever the logits' dtype.

    `F.cross_entropy(logits.float())` holds the logits, their fp32 copy, the log-probabilities and two gradients at
    once, 16 bytes per bf16 logit; this holds logits and gradient, 4 bytes, and one chunk in fp32.

    Returns:
        fp32 scalar; 0 with a graph for no positions.
    """
    return cast(Tensor, _CrossEntropySum.apply(logits_QC, targets_Q))


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_QC: Tensor, targets_Q: Tensor) -> Tensor:
        total = logits_QC.new_zeros((), dtype=torch.float32)
        lse_Q = logits_QC.new_empty(len(logits_QC), dtype=torch.float32)
        for rows in _chunks(logits_QC):
            chunk = logits_QC[rows].float()
            lse_Q[rows] = chunk.logsumexp(-1)
            total += (lse_Q[rows] - chunk.gather(1, targets_Q[rows, None])[:, 0]).sum()
        ctx.save_for_backward(logits_QC, targets_Q, lse_Q)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits_QC, targets_Q, lse_Q = ctx.saved_tensors
        grad_QC = torch.empty_like(logits_QC)
        for rows in _chunks(logits_QC):
            chunk = (logits_QC[rows] - lse_Q[rows, None]).exp_()  # fp32, as the lse is, and a tensor of its own
            chunk.scatter_add_(1, targets_Q[rows, None], -torch.ones_like(lse_Q[rows, None]))
            grad_QC[rows] = chunk.mul_(grad)
        return grad_QC, None


def _chunks(logits_QC: Tensor) -> list[slice]:
    rows, classes = logits_QC.shape
    step = max(1, CHUNK // classes)
    return [slice(start, start + step) for start in range(0, rows, step)]
