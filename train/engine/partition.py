"""Where DeepSpeed keeps the fp32 weights and AdamW's moments of every parameter, under each of its stages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train.optim import full_shape, prime
from train.run.fingerprint import Piece


class Partition:
    """This rank's share of an engine's state.

    Stage 0 has a master of every parameter, stages 1 and 2 one flat master per group of parameters, stage 3 one per
    subgroup. AdamW's state belongs to the masters; it exists from the start, so that it can be saved and loaded before
    the first step.
    """

    def __init__(self, engine: Any, stage: int, rank: int) -> None:
        self._engine, self._stage, self._rank = engine, stage, rank
        self._optimizer: torch.optim.AdamW = engine.basic_optimizer
        zero = engine.optimizer
        if stage == 3:
            self.masters: list[Tensor] = zero.fp32_partitioned_groups_flat
        elif stage > 0:
            self.masters = zero.single_partition_of_fp32_groups
        else:
            # DeepSpeed's wrapper for bf16 keeps copies of the parameters; in fp32 they are their own masters.
            published = getattr(zero, "fp16_groups", [group["params"] for group in zero.param_groups])
            masters = getattr(zero, "fp32_groups", published)
            self._published = [parameter for group in published for parameter in group]
            self.masters = [master for group in masters for master in group]
            self._master_of = {id(p): master for p, master in zip(self._published, self.masters, strict=True)}
            for parameter, master in zip(self._published, self.masters, strict=True):
                # That wrapper has taken a step on zeros to make AdamW's state, which has decayed the masters.
                master.data.copy_(parameter)
        prime(self._optimizer, self.masters)

    def pieces(self, parameters: Mapping[str, nn.Parameter], moment: str | None) -> dict[str, Piece]:
        """What this rank holds of each parameter: its weights, or one of its moments."""
        held = {}
        for name, parameter in parameters.items():
            part, start = self._held(parameter, moment) if parameter.requires_grad else self._frozen(parameter)
            # The last part of a tensor that does not divide is padded; no padding belongs to the tensor.
            total = math.prod(full_shape(parameter))
            numel = min(part.numel(), total - start)
            if numel > 0:
                held[name] = Piece(part.detach()[:numel], start, total)
        return held

    def step_counts(self) -> list[Tensor]:
        """AdamW's counters of its steps, one per master."""
        return [self._optimizer.state[master]["step"] for master in self.masters]

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the masters into the model's own parameters, on all ranks."""
        zero = self._engine.optimizer
        if self._stage == 0:
            for parameter, master in zip(self._published, self.masters, strict=True):
                parameter.copy_(master)
        elif self._stage < 3:
            zero.update_lp_params()
        else:
            # Small parameters are whole on every rank between steps; they are parted, filled and gathered again.
            zero.checkpoint_event_prologue()
            for published, master in zip(zero.fp16_partitioned_groups_flat, self.masters, strict=True):
                published.copy_(master)
            zero.checkpoint_event_epilogue()

    def _held(self, parameter: nn.Parameter, moment: str | None) -> tuple[Tensor, int]:
        """This rank's part of a trained tensor, flattened, and its first value's place in the whole."""
        if self._stage == 0:
            return self._state(self._master_of[id(parameter)], moment).view(-1), 0
        if self._stage == 3:
            part = self._stage_3(parameter, moment)
            return part, part.numel() * self._rank
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return torch.empty(0), 0
        place = mapping.get_hp_fragment_address()
        flat = self._state(self.masters[mapping.param_group_index], moment)
        return flat.narrow(0, place.start, place.numel), mapping.lp_fragment_address.start

    def _stage_3(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        part: Tensor = (
            safe_get_local_fp32_param(parameter)
            if moment is None
            else safe_get_local_optimizer_state(parameter, moment)
        )
        return part

    def _frozen(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        part = getattr(parameter, "ds_tensor", None)
        return (parameter.reshape(-1), 0) if part is None else (part.view(-1), part.numel() * self._rank)

    def _state(self, master: Tensor, moment: str | None) -> Tensor:
        state: Tensor = master if moment is None else self._optimizer.state[master][moment]
        return state
