"""Where the time of a step goes: its kernels by their time on the device, and how much of the step they fill."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu.session import Columns
from bench.gpu.timing import synchronize

MOST = 20
"""Kernels listed; the rest is summed up in a line of its own."""


def kernel_rows(step: Callable[[], object], device: torch.device) -> list[Columns]:
    """One profiled step: `busy` and the wall time first, then kernels with milliseconds, share and calls.

    Profiling slows the host down, so a `busy` under 1 is a lower bound. On a CPU the operations stand for kernels.
    """
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if is_cuda else [ProfilerActivity.CPU]
    step()
    synchronize(device)
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        step()
        synchronize(device)
        wall_ms = (time.perf_counter() - started) * 1e3
    found = [(event.key, _self_ms(event), event.count) for event in profiler.key_averages() if _counts(event, is_cuda)]
    found.sort(key=lambda kernel: -kernel[1])
    total_ms = sum(ms for _, ms, _ in found)
    rest = [(f"{len(found) - MOST} others", sum(ms for _, ms, _ in found[MOST:]), sum(n for *_, n in found[MOST:]))]
    return [
        {"kernel": "all", "ms": wall_ms, "busy": total_ms / wall_ms, "calls": sum(calls for *_, calls in found)},
        *(
            {"kernel": name[:90], "ms": ms, "share": ms / total_ms, "calls": calls}
            for name, ms, calls in found[:MOST] + (rest if found[MOST:] else [])
        ),
    ]


def _counts(event: Any, is_cuda: bool) -> bool:
    return not is_cuda or event.device_type == DeviceType.CUDA


def _self_ms(event: Any) -> float:
    on_device = event.device_type == DeviceType.CUDA
    return float(event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e3
