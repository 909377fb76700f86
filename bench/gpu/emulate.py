"""One of several ZeRO-2 ranks on a single card: its memory and its share of the work, without the communication."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from train.choices import Checkpointing
from train.compute import set_computation
from train.config import HardwareConfig, StageConfig, ZeroConfig
from train.optim import parameter_groups
from train.stage import freeze

NOT_INCLUDED = "communication between the ranks"
BUCKETS = 2
"""Of gradients under way: one is reduced while the other fills."""


class EmulatedRank:
    """Holds what a ZeRO-2 rank holds and steps what it steps.

    All weights in the model's dtype; fp32 weights, gradient sums and Adam moments of one of `ranks` equal shares; two
    buckets for gradients on their way. A parameter's gradient is added to the share and freed as soon as it is
    complete, as a reduction would. The learning rate is 0: every row sees the same weights, and AdamW costs the same.
    """

    def __init__(self, model: nn.Module, stage: StageConfig, ranks: int) -> None:
        freeze(model, stage)
        self.clip_norm = stage.clip_norm
        groups = parameter_groups(model, stage)
        self._shares: list[tuple[Tensor, Tensor, Tensor]] = []
        """This rank's slice of each trained parameter, its fp32 twin, and the twin's gradient."""
        self._hooks: list[RemovableHandle] = []
        trained = []
        for group in groups:
            group["lr"] = 0.0
            for index, parameter in enumerate(group["params"]):
                mine = parameter.detach().view(-1)[: math.ceil(parameter.numel() / ranks)]
                master = mine.float()
                master.grad = torch.zeros_like(master)
                self._shares.append((mine, master, master.grad))
                trained.append(parameter)
                group["params"][index] = master
        first = self._shares[0][0]
        self.optimizer = torch.optim.AdamW(groups, betas=stage.betas, eps=stage.eps, fused=first.device.type == "cuda")
        self._buckets = first.new_empty(BUCKETS, ZeroConfig().bucket_size)
        self.step()  # the moments exist from here on
        # Last, so that nothing is left on the model where memory ran out before.
        for parameter, (_, _, total) in zip(trained, self._shares, strict=True):
            self._hooks.append(parameter.register_post_accumulate_grad_hook(_reducer(total)))

    def step(self) -> None:
        """Clips, updates this rank's share, casts it back into the model's weights and clears the gradients."""
        mine, masters, totals = (list(column) for column in zip(*self._shares, strict=True))
        nn.utils.clip_grad_norm_(masters, self.clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(mine, masters)
            torch._foreach_zero_(totals)

    def close(self) -> None:
        """Leaves the model as it was, so that another rank can be built around it."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._shares = [], []
        del self.optimizer, self._buckets


def _reducer(total: Tensor) -> Callable[[Tensor], None]:
    def reduce(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad.reshape(-1)[: total.numel()])
        parameter.grad = None

    return reduce


def checkpoint_layers(model: Any, *, on: bool) -> None:
    """Switches activation checkpointing of the language model's layers, as a run's `hardware` config does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*activation_checkpointing")
        model.language_model.gradient_checkpointing_disable()
    if on:
        set_computation(model, HardwareConfig(activation_checkpointing=Checkpointing.on))


def run_step(rank: EmulatedRank, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
    """Forward and backward of each micro-batch, then the optimizer; the sum of the losses, still on the device."""
    total: Tensor | None = None
    for loss in losses:
        share = loss()
        share.backward()
        total = share.detach() if total is None else total + share.detach()
    rank.step()
    assert total is not None
    return total
