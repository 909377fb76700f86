"""Where DeepSpeed keeps the fp32 weights and AdamW's moments of every parameter, under each of its stages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from train.engine.swapped import Swapped, own_part
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
        self._swapped = Swapped(zero) if stage == 3 else None
        for index, master in enumerate(self.masters):
            with self._on_host(index, changes=True):
                prime(self._optimizer, [master])

    def _on_host(self, index: int, *, changes: bool) -> AbstractContextManager[None]:
        return nullcontext() if self._swapped is None else self._swapped.on_host(index, changes=changes)

    def pieces(self, parameters: Mapping[str, nn.Parameter], moment: str | None) -> dict[str, Piece]:
        """What this rank holds of each parameter: its weights, or one of its moments; copies of what is on NVMe."""
        copies = self._copies(parameters, moment)
        held = {}
        for name, parameter in parameters.items():
            if name in copies:
                part, start = copies[name], copies[name].numel() * self._rank
            else:
                part, start = self._held(parameter, moment) if parameter.requires_grad else self._frozen(parameter)
            # The last part of a tensor that does not divide is padded; no padding belongs to the tensor.
            total = math.prod(full_shape(parameter))
            numel = min(part.numel(), total - start)
            if numel > 0:
                held[name] = Piece(part.detach()[:numel], start, total)
        return held

    @torch.no_grad()
    def keep(self, parameters: Mapping[str, nn.Parameter], pieces: Mapping[str, Piece], moment: str | None) -> None:
        """Writes what `pieces` gave, and was changed since, back to where it was a copy of."""
        for index, names in self._names_by_file(parameters).items():
            with self._on_host(index, changes=True):
                for name in names:
                    if name in pieces:
                        values = pieces[name].values
                        self._stage_3(parameters[name], moment)[: values.numel()].copy_(values)

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
            for index in range(len(self.masters)):
                with self._on_host(index, changes=False):
                    zero._reassign_or_swap_out_partitioned_parameters(index)
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
        # Not through DeepSpeed's functions for this, which copy what lies on the host to the card.
        zero = self._engine.optimizer
        index, start, count = zero.grad_position[zero.get_param_id(parameter)]
        return self._state(self.masters[index], moment).narrow(0, start, count)

    def _frozen(self, parameter: nn.Parameter) -> tuple[Tensor, int]:
        if not hasattr(parameter, "ds_tensor"):
            return parameter.reshape(-1), 0
        part = own_part(parameter)
        return part, part.numel() * self._rank

    def _copies(self, parameters: Mapping[str, nn.Parameter], moment: str | None) -> dict[str, Tensor]:
        copies = {}
        for index, names in self._names_by_file(parameters).items():
            with self._on_host(index, changes=False):
                for name in names:
                    copies[name] = self._stage_3(parameters[name], moment).detach().clone()
        return copies

    def _names_by_file(self, parameters: Mapping[str, nn.Parameter]) -> dict[int, list[str]]:
        """Subgroup on NVMe -> the trained ones of these parameters that are in it."""
        zero, found = self._engine.optimizer, dict[int, list[str]]()
        if self._swapped is None:
            return found
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                index = zero.grad_position[zero.get_param_id(parameter)][0]
                if self._swapped.holds(index):
                    found.setdefault(index, []).append(name)
        return found

    def _state(self, master: Tensor, moment: str | None) -> Tensor:
        state: Tensor = master if moment is None else self._optimizer.state[master][moment]
        return state
