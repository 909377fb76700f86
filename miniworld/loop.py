"""The optimisation loop that both tiny backbones share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

WARMUP_STEPS = 50
FLOOR = 0.05
"""Where the cosine ends, as a share of the peak."""


def fit(
    model: nn.Module, batches: Iterable[object], loss_of: Callable[..., Tensor], *, steps: int, lr: float,
    weight_decay: float, name: str, position: int,
) -> float:  # fmt: skip
    """Trains for a fixed number of steps with AdamW, a cosine and bf16 where the CPU computes it faster.

    Args:
        position: line of the progress bar, for two of them at a time.

    Returns:
        Mean loss of the last tenth of the steps.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    model.train()
    tail: list[float] = []
    with tqdm(total=steps, desc=name, unit="step", position=position) as bar:
        for step, batch in zip(range(steps), batches, strict=False):
            with torch.autocast("cpu", torch.bfloat16, enabled=computes_bf16()):
                loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step >= steps - max(1, steps // 10):
                tail.append(loss.item())
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    model.eval()
    return sum(tail) / len(tail)


def computes_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware; elsewhere bf16 is emulated and slower than fp32."""
    capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(capable)


def _share(step: int, steps: int) -> float:
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))
