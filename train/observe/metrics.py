"""The record of a run: what each step was made of, one JSON line per step, and the line on the console."""

from __future__ import annotations

import logging
import resource
import sys
from typing import Any

import torch

from train.config import Part
from train.facts import StepFacts
from train.observe.mfu import Mfu

log = logging.getLogger(__name__)


def step_record(
    step: int,
    loss: float,
    lrs: dict[str, float],
    grad_norm: float,
    norms: dict[Part, float] | None,
    facts: StepFacts,
    time: dict[str, float],
    *,
    is_clipped: bool,
) -> dict[str, Any]:
    """One line of metrics.jsonl; everything outside `time` is a function of config, data and weights alone.

    Args:
        grad_norm: of the whole gradient, before clipping.
        norms: gradient norm per part in the steps that log it, else None.
        time: seconds and rates, memory.
        is_clipped: whether the step was taken with a shortened gradient.
    """
    record: dict[str, Any] = {"step": step, "loss": loss, "lr": lrs, "grad_norm": grad_norm, "clipped": is_clipped}
    if norms is not None:
        record["part_grad_norm"] = {part.value: norm for part, norm in norms.items()}
    return record | {
        "supervised_tokens": facts.supervised, "tokens": facts.tokens, "samples": len(facts.sample_ids),
        "images": facts.images, "skipped": facts.skipped, "padding_share": facts.padding_share,
        "sample_ids": list(facts.sample_ids), "time": {name: round(value, 6) for name, value in time.items()},
    }  # fmt: skip


def time_record(
    seconds: float, data_wait: float, facts: StepFacts, device: torch.device, mfu: Mfu | None = None
) -> dict[str, float]:
    """Rates over all ranks, what each took by itself (`observe.pace`), and rank 0's wait for data and peak memory."""
    own = facts.own_seconds
    return {
        "seconds": seconds,
        "data_wait_seconds": data_wait,
        "tokens_per_second": facts.tokens / seconds,
        "samples_per_second": len(facts.sample_ids) / seconds,
        "own_seconds_max": max(own),
        "own_seconds_mean": sum(own) / len(own),
        "slowest_rank": own.index(max(own)),
        "peak_memory_gib": peak_memory(device) / 2**30,
    } | ({} if mfu is None else {"mfu": mfu.share(facts, seconds)})  # fmt: skip


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held: on the accelerator, or resident in RAM where there is none."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024


class Console:
    """The line on rank 0's terminal every few steps: where the run is, how well, how fast, how long still."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total, self._first = total_steps, first_step
        self._seconds = 0.0

    def count(self, seconds: float) -> None:
        """Adds a step to the mean that the remaining time is estimated from."""
        self._seconds += seconds

    def show(self, record: dict[str, Any]) -> None:
        step, time = record["step"], record["time"]
        remaining = (self._total - step) * self._seconds / (step - self._first)
        lr = max(record["lr"].values())
        log.info(
            "step %d/%d %3.0f%%  loss %.4f  lr %.2e  |g| %.3g  %.0f tok/s  %.1f samples/s%s  data %.0f%%  left %s",
            step, self._total, 100 * step / self._total, record["loss"], lr, record["grad_norm"],
            time["tokens_per_second"], time["samples_per_second"],
            f"  MFU {time['mfu']:.1%}" if "mfu" in time else "",
            100 * time["data_wait_seconds"] / time["seconds"], _clock(remaining),
        )  # fmt: skip


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
