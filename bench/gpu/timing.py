"""How time and memory are measured on a device: events, rotated inputs, a cold cache, peaks of one call."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

GB = 1e9
ON_CPU = 2
"""Calls on the CPU, where only the code is tried."""
_L2_FLUSH_BYTES = 256 << 20
"""Several times the largest cache of a present card."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What one operation takes.

    Attributes:
        ms: median milliseconds.
        low_ms, high_ms: first and last decile, for the noise.
        runs: timed calls.
        peak_gb: most memory allocated during a call, everything that was there before included; None on CPU.
        transient_gb: the same without what was there before.
    """

    ms: float
    low_ms: float
    high_ms: float
    runs: int
    peak_gb: float | None
    transient_gb: float | None

    def columns(self) -> dict[str, float | int | None]:
        """As columns of a row."""
        return {
            "ms": self.ms, "low_ms": self.low_ms, "high_ms": self.high_ms, "runs": self.runs,
            "peak_gb": self.peak_gb, "transient_gb": self.transient_gb,
        }  # fmt: skip


def measure(
    call: Callable[..., object],
    inputs: Sequence[Sequence[Any]],
    device: torch.device,
    *,
    seconds: float = 0.2,
    at_least: int = 5,
    at_most: int = 200,
) -> Timing:
    """Median time of `call(*inputs[i])` over rotating input sets.

    On CUDA each call lies between two events and begins with a cold L2; filling the cache with something else also
    gives the host time to run ahead, so that what is timed is the device wherever the host is not slower than it.

    Args:
        seconds: how long to go on measuring.
        at_least, at_most: bounds on the number of timed calls.
    """
    call(*inputs[0])
    call(*inputs[-1])
    peak, transient = _peaks(call, inputs[0], device)
    synchronize(device)
    started = time.perf_counter()
    call(*inputs[0])
    synchronize(device)
    estimate = time.perf_counter() - started
    if device.type == "cuda":
        times = _event_times(call, inputs, min(max(at_least, int(seconds / max(estimate, 1e-6))), at_most))
    else:
        times = _host_times(call, inputs, ON_CPU)
    times.sort()
    return Timing(
        ms=statistics.median(times), low_ms=times[len(times) // 10], high_ms=times[-1 - len(times) // 10],
        runs=len(times),
        peak_gb=peak, transient_gb=transient,
    )  # fmt: skip


def _event_times(call: Callable[..., object], inputs: Sequence[Sequence[Any]], runs: int) -> list[float]:
    cache = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    borders = [[torch.cuda.Event(enable_timing=True) for _ in range(runs)] for _ in range(2)]
    for index, (start, end) in enumerate(zip(*borders, strict=True)):
        cache.zero_()
        start.record()
        call(*inputs[index % len(inputs)])
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(*borders, strict=True)]


def _host_times(call: Callable[..., object], inputs: Sequence[Sequence[Any]], runs: int) -> list[float]:
    times = []
    for index in range(runs):
        started = time.perf_counter()
        call(*inputs[index % len(inputs)])
        times.append((time.perf_counter() - started) * 1e3)
    return times


def _peaks(
    call: Callable[..., object], arguments: Sequence[Any], device: torch.device
) -> tuple[float, float] | tuple[None, None]:
    if device.type != "cuda":
        return None, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(*arguments)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return peak / GB, (peak - before) / GB


def graphed(call: Callable[..., object], arguments: Sequence[Any]) -> Callable[..., None]:
    """`call(*arguments)` captured in a CUDA graph; the result replays it and ignores its arguments."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*arguments)
    return lambda *_: graph.replay()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def release(device: torch.device) -> None:
    """Gives cached memory back where it is much, so that one row's leftovers are not the next one's obstacle."""
    if device.type == "cuda" and torch.cuda.memory_reserved() > GB:
        gc.collect()
        torch.cuda.empty_cache()


class Budget:
    """The time a command may take; asked before each row."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self._started

    def allows(self, seconds: float) -> bool:
        """Whether a row that takes about so long still fits."""
        return self.spent + seconds <= self.seconds


def matmul_ceiling(device: torch.device, side: int) -> float:
    """FLOP/s of a bf16 matrix product of random data, side x side x side: what a kernel can hope for on this card."""
    factors = [tuple(torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2)) for _ in range(2)]
    timing = measure(torch.matmul, factors, device, at_least=3, seconds=0.3)
    return 2 * side**3 / (timing.ms * 1e-3)


def copy_ceiling(device: torch.device, num_bytes: int) -> float:
    """Bytes per second, read plus written, of a copy within the device's memory."""
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = measure(target.copy_, [(source,)], device, at_least=3, seconds=0.3)
    return 2 * num_bytes / (timing.ms * 1e-3)
