"""The record of a run: what each step was made of, one JSON line per step, and the line on the console."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from evals.memory import GIB, Memory
from train.choices import Part
from train.facts import StepFacts
from train.observe.memory import by_rank, unevenness
from train.observe.mfu import Mfu

log = logging.getLogger(__name__)


def step_record(
    step: int,
    loss: float,
    lrs: dict[str, float],
    grad_norm: float,
    norms: dict[Part, float] | None,
    facts: StepFacts,
    time: dict[str, Any],
    *,
    is_clipped: bool,
) -> dict[str, Any]:
    """One line of metrics.jsonl; everything outside `time` is a function of config, data and weights alone.

    Args:
        grad_norm: of the whole gradient, before clipping.
        norms: gradient norm per part in the steps that log it, else None.
        time: as `time_record` gives it.
        is_clipped: whether the step was taken with a shortened gradient.
    """
    record: dict[str, Any] = {"step": step, "loss": loss, "lr": lrs, "grad_norm": grad_norm, "clipped": is_clipped}
    if norms is not None:
        record["part_grad_norm"] = {part.value: norm for part, norm in norms.items()}
    return record | {
        "supervised_tokens": facts.supervised, "tokens": facts.tokens, "samples": len(facts.sample_ids),
        "images": facts.images, "skipped": facts.skipped, "padding_share": facts.padding_share,
        "sample_ids": list(facts.sample_ids), "time": time,
    }  # fmt: skip


def time_record(
    seconds: float,
    data_wait: float,
    facts: StepFacts,
    device: torch.device,
    mfu: Mfu | None = None,
    *,
    is_logged: bool = True,
) -> dict[str, Any]:
    """Rates over all ranks, the slowest rank (`observe.pace`) and the fullest, and rank 0's wait for data.

    What others have held is known up to the step's exchange, what this rank has, up to now.

    Args:
        is_logged: whether each rank's own numbers are listed under `ranks`.
    """
    own, held = facts.own_seconds, [memory.computing for memory in facts.memory]
    values = {
        "seconds": seconds,
        "data_wait_seconds": data_wait,
        "tokens_per_second": facts.tokens / seconds,
        "samples_per_second": len(facts.sample_ids) / seconds,
        "own_seconds_max": max(own),
        "own_seconds_mean": sum(own) / len(own),
        "slowest_rank": own.index(max(own)),
        "peak_memory_gib": max(Memory.of(device).computing, *held) / GIB,
        "fullest_rank": held.index(max(held)),
    } | ({} if mfu is None else {"mfu": mfu.share(facts, seconds)})  # fmt: skip
    record: dict[str, Any] = {name: round(value, 6) for name, value in values.items()}
    if is_logged:
        record["ranks"] = {"own_seconds": [round(value, 6) for value in own], **by_rank(facts.memory)}
    return record


class Console:
    """The line on rank 0's terminal every few steps: where the run is, how well, how fast, how long still."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total, self._first = total_steps, first_step
        self._seconds = 0.0

    def count(self, seconds: float) -> None:
        """Adds a step to the mean that the remaining time is estimated from."""
        self._seconds += seconds

    def show(self, record: dict[str, Any]) -> None:
        """
        Args:
            record: of a step whose ranks are listed.
        """
        step, time = record["step"], record["time"]
        remaining = (self._total - step) * self._seconds / (step - self._first)
        lr = max(record["lr"].values())
        log.info(
            "step %d/%d %3.0f%%  loss %.4f  lr %.2e  |g| %.3g  %.0f tok/s  %.1f samples/s%s  data %.0f%%  left %s%s",
            step, self._total, 100 * step / self._total, record["loss"], lr, record["grad_norm"],
            time["tokens_per_second"], time["samples_per_second"],
            f"  MFU {time['mfu']:.1%}" if "mfu" in time else "",
            100 * time["data_wait_seconds"] / time["seconds"], _clock(remaining),
            "".join(f"  {words}" for words in _uneven(time["ranks"])),
        )  # fmt: skip


def _uneven(ranks: Mapping[str, Sequence[float]]) -> Iterator[str]:
    for key, kind in (("device_gib", "card"), ("host_gib", "RAM")):
        words = unevenness(ranks[key], kind) if key in ranks else None
        if words is not None:
            yield words


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
