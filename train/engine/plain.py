"""The one-process engine in plain PyTorch: the yardstick that the sharded one is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from anchorformer.contracts import Batch
from train.choices import Part
from train.config import RunConfig
from train.distributed import World
from train.engine.base import Engine
from train.loss import supervised_loss
from train.optim import build_optimizer, build_scheduler, part_of_parameter, prime
from train.run.fingerprint import Piece
from train.stage import assert_declared, trained_state


class PlainEngine(Engine):
    """Same interface and numbers as DeepSpeed's, without it; bf16 models keep fp32 weights beside them here as well."""

    def __init__(self, model: nn.Module, config: RunConfig, world: World, total_steps: int) -> None:
        super().__init__(config, world)
        self.model = model.to(world.device)
        self._owners = part_of_parameter(model, config.stage)
        self.optimizer = build_optimizer(model, config.stage, world.device)
        self._pairs: dict[str, tuple[nn.Parameter, Tensor]] = {}
        """Name -> the model's parameter and the fp32 weights the optimizer updates (the same tensor in fp32 runs)."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in self.optimizer.param_groups:
            for index, parameter in enumerate(group["params"]):
                master = parameter if parameter.dtype == torch.float32 else parameter.detach().float()
                self._pairs[names[id(parameter)]] = (parameter, master)
                group["params"][index] = master
        prime(self.optimizer, [master for _, master in self._pairs.values()])
        assert_declared(model, config.stage, {id(parameter) for parameter, _ in self._pairs.values()})
        self.scheduler = build_scheduler(self.optimizer, config.stage, total_steps)

    def _backward(self, batch: Batch, step_supervised: int, *, is_last: bool) -> Tensor:
        with record_function("forward"):
            loss = supervised_loss(self.model, batch, step_supervised)
        with record_function("backward"):
            loss.backward()
        for parameter, master in self._pairs.values():
            if master is not parameter and parameter.grad is not None:
                # Summed in fp32: a bf16 sum loses what a micro-batch adds below a 256th of it.
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None
        return loss.detach()

    def _gradients(self) -> Iterator[tuple[Part, Tensor]]:
        for parameter, master in self._pairs.values():
            if master.grad is not None:
                yield self._owners[id(parameter)], master.grad

    def step(self) -> None:
        if self.config.stage.clip_norm > 0:
            nn.utils.clip_grad_norm_([master for _, master in self._pairs.values()], self.config.stage.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        self._publish()
        for _, master in self._pairs.values():
            master.grad = None

    @property
    def _param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _pieces(self, parameters: Mapping[str, nn.Parameter], moment: str | None = None) -> dict[str, Piece]:
        held = {name: self._pairs[name][1] if name in self._pairs else value for name, value in parameters.items()}
        if moment is not None:
            held = {name: self.optimizer.state[master][moment] for name, master in held.items()}
        return {name: Piece.whole(tensor) for name, tensor in held.items()}

    def gather(self, part: Part) -> dict[str, Tensor] | None:
        return {
            name: tensor.detach().cpu() for name, tensor in trained_state(self.model, self.config.stage, part).items()
        }

    def _save_shards(self, folder: Path) -> list[Path]:
        raise NotImplementedError("one process writes whole tensors")

    def _load_shards(self, folder: Path) -> None:
        raise NotImplementedError("one process reads whole tensors")

    def _step_counts(self) -> list[Tensor]:
        return [self.optimizer.state[master]["step"] for _, master in self._pairs.values()]

    def _keep(self, pieces: Mapping[str, Piece], moment: str | None) -> None:
        """They are the tensors themselves."""

    @torch.no_grad()
    def _publish(self) -> None:
        for parameter, master in self._pairs.values():
            if master is not parameter:
                parameter.copy_(master)
