"""The one-process engine in plain PyTorch: the yardstick that the sharded one is measured against."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from anchorformer.contracts import Batch
from anchorformer.weights import part_state
from train.config import Part, RunConfig
from train.distributed import World
from train.engine.base import Engine, squared_norms
from train.loss import supervised_loss
from train.optim import build_optimizer, build_scheduler, part_of_parameter
from train.stage import assert_declared

STATE = "plain.pt"


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
        assert_declared(model, config.stage, {id(parameter) for parameter, _ in self._pairs.values()})
        self.scheduler = build_scheduler(self.optimizer, config.stage, total_steps)

    def _backward(self, batch: Batch, step_supervised: int, *, is_last: bool) -> Tensor:
        loss = supervised_loss(self.model, batch, step_supervised)
        loss.backward()
        for parameter, master in self._pairs.values():
            if master is not parameter and parameter.grad is not None:
                # Summed in fp32: a bf16 sum loses what a micro-batch adds below a 256th of it.
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None
        return loss.detach()

    def part_grad_norms(self) -> dict[Part, float]:
        gradients = (
            (self._owners[id(parameter)], master.grad)
            for parameter, master in self._pairs.values()
            if master.grad is not None
        )
        squares = squared_norms(gradients, self.config.stage.trains)
        return {part: square**0.5 for part, square in squares.items()}

    def step(self) -> None:
        if self.config.stage.clip_norm > 0:
            nn.utils.clip_grad_norm_([master for _, master in self._pairs.values()], self.config.stage.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        with torch.no_grad():
            for parameter, master in self._pairs.values():
                if master is not parameter:
                    parameter.copy_(master)
                master.grad = None

    @property
    def lrs(self) -> dict[str, float]:
        return {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}

    def values(self) -> dict[str, Tensor]:
        held = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        return held | {name: master.detach() for name, (_, master) in self._pairs.items()}

    def gather(self, part: Part) -> dict[str, Tensor] | None:
        return {name: tensor.detach().cpu() for name, tensor in part_state(self.model, part.value).items()}

    def save(self, folder: Path) -> list[Path]:
        weights = {name: master.detach() for name, (_, master) in self._pairs.items()}
        torch.save(
            {"weights": weights, "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()},
            folder / STATE,
        )
        return [folder / STATE]

    def load(self, folder: Path) -> None:
        state = torch.load(folder / STATE, map_location=self.world.device, weights_only=True)
        with torch.no_grad():
            for name, (parameter, master) in self._pairs.items():
                master.copy_(state["weights"][name])
                if master is not parameter:
                    parameter.copy_(master)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
