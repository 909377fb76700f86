"""AdamW over named parameter groups and the learning rate's course over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from train.choices import Part, Schedule
from train.config import StageConfig


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape, also where ZeRO-3 has left this rank only a part of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def parameter_groups(model: nn.Module, stage: StageConfig) -> list[dict[str, Any]]:
    """Groups for AdamW, one per trained part and decay setting, named `<part>/decay` and `<part>/no_decay`.

    Matrices (embeddings among them) decay, everything of fewer dimensions does not. Each parameter is in exactly one
    group; a tied one belongs to the part that is declared first.
    """
    groups, seen = [], set()
    for part, config in stage.trains.items():
        members: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for parameter in getattr(model, part.value).parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                members[len(full_shape(parameter)) >= 2].append(parameter)
        for decays, parameters in members.items():
            if parameters:
                groups.append({
                    "params": parameters, "lr": config.lr, "part": part.value,
                    "weight_decay": config.weight_decay if decays else 0.0,
                    "name": f"{part.value}/{'decay' if decays else 'no_decay'}",
                })  # fmt: skip
    return groups


def build_optimizer(model: nn.Module, stage: StageConfig, device: torch.device) -> torch.optim.AdamW:
    """PyTorch's own AdamW (Loshchilov and Hutter, 2019): needs no compiler, and its groups keep their names."""
    return torch.optim.AdamW(
        parameter_groups(model, stage), betas=stage.betas, eps=stage.eps, fused=device.type == "cuda"
    )


def prime(optimizer: torch.optim.AdamW, weights: Iterable[Tensor]) -> None:
    """Makes the state that AdamW's first step would make, so that it can be saved and loaded before any step.

    Args:
        weights: the tensors that the optimizer updates.
    """
    for weight in weights:
        # Where torch puts it: fused steps are counted on the device.
        counter = weight.device if optimizer.defaults["fused"] else "cpu"
        optimizer.state[weight] = {
            "step": torch.zeros((), dtype=torch.float32, device=counter),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }


def lr_factor(step: int, total_steps: int, stage: StageConfig) -> float:
    """Learning rate of step `step` (from 0) as a share of the peak.

    Rises linearly over the first ceil(warmup_ratio * total) steps, the first of which already moves the weights, then
    follows half a cosine to `min_lr_ratio` (Loshchilov and Hutter, 2017) or stays constant.
    """
    warmup = math.ceil(stage.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule is Schedule.constant:
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return stage.min_lr_ratio + (1.0 - stage.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_scheduler(optimizer: torch.optim.Optimizer, stage: StageConfig, total_steps: int) -> LambdaLR:
    """`lr_factor` on every group."""
    return LambdaLR(optimizer, lambda step: lr_factor(step, total_steps, stage))


def part_of_parameter(model: nn.Module, stage: StageConfig) -> dict[int, Part]:
    """`id(parameter)` -> the trained part it belongs to."""
    owners: dict[int, Part] = {}
    for part in stage.trains:
        for parameter in getattr(model, part.value).parameters():
            owners.setdefault(id(parameter), part)
    return owners
