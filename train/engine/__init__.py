"""The door to the engines: which one a run gets, and how its model is loaded for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from anchorformer.errors import UserError
from train.choices import EngineName
from train.config import RunConfig
from train.distributed import World
from train.engine.base import Engine

__all__ = ["Engine", "build_engine", "loading"]


@contextmanager
def loading(config: RunConfig, world: World, dtype: torch.dtype) -> Iterator[None]:
    """Loads a model inside this block as the run's engine wants it: under ZeRO-3 each rank keeps only its part."""
    if config.engine is EngineName.plain or config.zero.stage < 3:
        yield
        return
    from train.engine.zero import partitioned_loading  # DeepSpeed takes seconds to import

    with partitioned_loading(config, world, dtype):
        yield


def build_engine(model: nn.Module, config: RunConfig, world: World, total_steps: int, dtype: torch.dtype) -> Engine:
    """The run's engine around a model whose frozen parts are frozen already.

    Args:
        model: parameters in `dtype`, loaded inside `loading`.
        total_steps: of the whole run, for the learning rate's course.
        dtype: fp32 or bf16; the optimizer's state and the weights it updates are fp32 either way.

    Raises:
        UserError: the plain engine with more than one rank.
    """
    if config.engine is EngineName.plain:
        if world.size > 1:
            raise UserError(
                "the plain engine runs in one process", found=f"{world.size} ranks", expected="hardware.ranks=1",
                remedy="set engine=deepspeed",
            )  # fmt: skip
        from train.engine.plain import PlainEngine

        return PlainEngine(model, config, world, total_steps)
    from train.engine.zero import ZeroEngine

    return ZeroEngine(model, config, world, total_steps, dtype)
