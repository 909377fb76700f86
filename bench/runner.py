"""How time and memory are measured on a CPU, and what a row of the comparison holds."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

_MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
"""Read by glibc when a process starts: bytes from which a block of memory gets a mapping of its own."""


class Size(str, Enum):
    """How much is measured."""

    tiny = "tiny"
    """Toy shapes: what a test runs to see that every comparison still works; its times mean nothing."""
    quick = "quick"
    """True shapes of single layers: at most 3 minutes for everything."""
    full = "full"
    """Whole models and steps as well: at most 20 minutes."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
        name: what was measured, with the shape that decides it.
        unit: of `old` and `new`; a unit per second, and a share, are better the larger they are.
        old: as published; None where there is no published counterpart.
        new: ours.
        equal: whether both gave the same result; what that means there is said in `note`.
        goal_ratio: how many times better `new` has to be.
        goal: what `new` itself has to reach.
        note: how it was measured, and why a goal was missed.
    """

    name: str
    unit: str
    new: float
    old: float | None = None
    equal: bool | None = None
    goal_ratio: float | None = None
    goal: float | None = None
    note: str = ""

    @property
    def more_is_better(self) -> bool:
        return self.unit == "share" or "/s" in self.unit

    @property
    def ratio(self) -> float | None:
        """How many times better `new` is."""
        if self.old is None:
            return None
        return self.new / self.old if self.more_is_better else self.old / self.new

    @property
    def met(self) -> bool | None:
        """Whether every goal was reached; None where there is none."""
        reached = []
        if self.goal_ratio is not None and self.ratio is not None:
            reached.append(self.ratio >= self.goal_ratio)
        if self.goal is not None:
            reached.append(self.new >= self.goal if self.more_is_better else self.new <= self.goal)
        return all(reached) if reached else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "met": self.met}


def cpu_seconds(calls: dict[str, Callable[[], object]], repeats: int, *, warm_up: bool = True) -> dict[str, float]:
    """Least CPU seconds of each call over `repeats` rounds, after one round that is not counted.

    A call that takes minutes needs no such round: filling its caches is lost in it.

    The calls take turns (A, B, A, B, ...), so that a machine that slows down slows all of them; CPU seconds instead of
    wall time, and the least of several, because other processes may use the same cores.
    """
    least = dict.fromkeys(calls, float("inf"))
    gc.collect()
    gc.disable()  # a collection costs a tenth of a second and would fall on whichever call allocates
    try:
        for round_ in range(repeats + warm_up):
            for name, call in calls.items():
                before = time.process_time()
                call()
                taken = time.process_time() - before
                if round_ >= warm_up:
                    least[name] = min(least[name], taken)
    finally:
        gc.enable()
    return least


def peak_bytes(call: Callable[[], object], repeats: int = 2) -> int:
    """Most resident memory during the call beyond what was there before it, the least of `repeats` calls.

    Read from the kernel (VmHWM, reset through clear_refs) in steps of a page. The first call also fills caches that
    later ones find. Exact `in_fresh_process`; elsewhere holes in the heap, left by earlier work, add to it by chance.
    """
    least = sys.maxsize
    for _ in range(repeats):
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        call()
        least = min(least, resident("VmHWM") - before)
    return least


def in_fresh_process(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """The function's result from a new process in which every large tensor has a mapping of its own from the start.

    Freed tensors then leave the process at once, so that its resident memory is what is in use.
    """
    os.environ[_MMAP_THRESHOLD] = str(1 << 16)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as fresh:
            return fresh.submit(function, *args, **kwargs).result()
    finally:
        del os.environ[_MMAP_THRESHOLD]


def resident(field: str) -> int:
    """Bytes of this process in memory, by the kernel's name: VmRSS, VmHWM (the most so far), RssAnon (not shared)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; memory is measured on Linux only")


def saved_bytes(forward: Callable[[], Result], besides: Iterable[Tensor]) -> tuple[int, Result]:
    """Exact bytes that autograd keeps alive between forward and backward, and the forward's result.

    Each storage counts once and whole, however many views of it are kept. What was packed and let go before the
    forward returned does not count.

    Args:
        besides: tensors that exist anyway, as parameters and inputs; they do not count.
    """
    exempt = {tensor.untyped_storage().data_ptr() for tensor in besides}
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = forward()
    gc.collect()
    storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in alive}
    return sum(size for pointer, size in storages.items() if pointer not in exempt), result


class _Saved:
    """What autograd holds instead of a tensor; it dies when autograd lets go."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its graph it would keep itself alive


def error(value: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest value of the reference."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).abs().max() / reference.abs().max())


def as_accurate(new: Tensor, old: Tensor, reference: Tensor) -> bool:
    """Whether `new` is at most twice as far from a reference of higher precision as `old` in the same precision is.

    The rule of flash-attention's tests; the smallest fp32 step keeps two exact results from failing each other.
    """
    return error(new, reference) <= 2 * error(old, reference) + torch.finfo(torch.float32).eps
