"""Ranks and what they tell each other outside of gradients: start, gather, sum, broadcast, barrier."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from anchorformer.devices import Device
from anchorformer.errors import UserError
from train.config import WatchdogConfig

T = TypeVar("T")

TIMEOUT = timedelta(seconds=WatchdogConfig().collective_seconds)
"""Longest wait in a collective of a process that has no run's configuration."""


@dataclass(frozen=True)
class World:
    """This process among the ranks.

    Attributes:
        control: a gloo group for small facts on the host, so that no such message has to pass through the accelerator;
            None for a single process without a process group, where every operation is the identity.
    """

    rank: int
    size: int
    device: torch.device
    control: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in rank order, on every rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def collect(self, value: T) -> list[T] | None:
        """`value` of every rank, in rank order, on rank 0; None on the others, which see only their own."""
        if self.control is None:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the ranks in fp64; the same bits on every rank."""
        if self.control is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return [float(value) for value in total]

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(group=self.control)

    def settle(self, problem: UserError | None) -> None:
        """Raises on every rank what went wrong on one of them, so that none waits for another that has left."""
        for found in self.gather(problem):
            if found is not None:
                raise found


def alone(device: torch.device | None = None) -> World:
    """A world of one process, without a process group."""
    return World(rank=0, size=1, device=device or torch.device("cpu"))


def start(device: Device, timeout: timedelta = TIMEOUT) -> World:
    """Joins the process group that torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*) describes.

    Args:
        timeout: longest wait in a collective of the groups made here; see `bound_waits` for all others.

    Raises:
        UserError: a CUDA device is asked for and this machine has too few, or torchrun did not start this process.
    """
    if "RANK" not in os.environ:
        raise UserError(
            "this process is not a rank", found="no RANK in the environment",
            expected="to be started by torchrun", remedy="start with `python -m train ...`, or torchrun -m train.rank",
        )  # fmt: skip
    rank, size, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    place = choose_device(device, local)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timeout, group_desc="control")
    return World(rank=rank, size=size, device=place, control=control)


def bound_waits(timeout: timedelta) -> int:
    """Gives every process group that exists the same longest wait; call it when the engine has made its own.

    DeepSpeed passes its timeout to the first group only; those it makes for ZeRO keep torch's default of 10 or 30
    minutes, so that a rank would wait in ZeRO's collectives for longer, or shorter, than the run's configuration says.
    Both names are private to torch; a test watches them.

    Returns:
        How many groups there are.
    """
    groups = list(distributed_c10d._world.pg_map) if dist.is_initialized() else []
    for group in groups:
        distributed_c10d._set_pg_timeout(timeout, group)
    return len(groups)


def process_groups(world_size: int) -> list[dict[str, Any]]:
    """The process groups that this rank is in, DeepSpeed's among them: backend, members, longest wait in seconds."""
    found = []
    for group, (backend, _) in distributed_c10d._world.pg_map.items() if dist.is_initialized() else ():
        members = dist.get_process_group_ranks(group)
        kinds = [torch.device(kind) for kind in ("cpu", "cuda") if torch.device(kind) in group._device_types]
        waits = {group._get_backend(kind).options._timeout.total_seconds() for kind in kinds}
        found.append({
            "description": group.group_desc, "backend": backend,
            "ranks": "all" if len(members) == world_size else members, "timeout_seconds": max(waits, default=None),
        })  # fmt: skip
    return found


def choose_device(device: Device, local_rank: int) -> torch.device:
    """The device of this rank; `auto` takes CUDA where the machine has it.

    Raises:
        UserError: CUDA is asked for, and the machine has fewer devices than ranks.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is Device.cpu or (device is Device.auto and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise UserError(
            "there are more ranks than CUDA devices", found=f"{count} device(s), local rank {local_rank}",
            expected="one device per rank", remedy=f"set hardware.ranks={max(count, 1)}, or hardware.device=cpu",
        )  # fmt: skip
    return torch.device("cuda", local_rank)


def stop() -> None:
    """Leaves the process group; safe to call where none was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
