"""What the record of a run amounts to: losses, rates, memory, scores; None where nothing was recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evals.config import Condition
from evals.report.entry import Entry
from evals.report.reading import Row, Stage

WINDOW = 10
"""Steps over which the losses at the start and at the end are averaged."""
COSTS = {
    "visual tokens": "visual tokens per image",
    "ms/question": "ms per question in evaluation",
    "ms/sample": "ms per sample in training",
    "peak GiB": "peak memory in training (GiB, fullest rank)",
}
"""What a score is weighed against: name in tables -> on an axis. All are better when lower."""
TIMING = ("vision_features", "precision", "batch_size", "machine", "ranks")
"""What results have to share before their milliseconds are set side by side."""


def loss_at_start(stage: Stage) -> float | None:
    """Mean over the first steps, in nats per supervised token."""
    return mean(row["loss"] for row in stage.steps[: _window(stage)])


def loss_at_end(stage: Stage) -> float | None:
    """Mean over the last steps, in nats per supervised token."""
    return mean(row["loss"] for row in stage.steps[-_window(stage) :])


def seconds(stage: Stage) -> float | None:
    """Seconds spent in recorded steps; starting, saving and evaluating are not among them."""
    return sum(row["time"]["seconds"] for row in stage.steps) if stage.steps else None


def rate(stage: Stage, what: str) -> float | None:
    """`what` (tokens, samples) per second over all recorded steps."""
    spent = seconds(stage)
    return sum(row[what] for row in stage.steps) / spent if spent else None


def ms_per_sample(stage: Stage) -> float | None:
    """Milliseconds of training per sample, over all ranks."""
    samples = sum(row["samples"] for row in stage.steps)
    spent = seconds(stage)
    return 1000 * spent / samples if spent and samples else None


def peak_memory(stage: Stage) -> float | None:
    """GiB that the fullest rank has held."""
    held = [row["time"]["peak_memory_gib"] for row in stage.steps if "peak_memory_gib" in row["time"]]
    return max(held, default=None)


def ms_per_question(result: Row) -> float | None:
    """Milliseconds of evaluation per question: generation in batches, on the machine that the result names."""
    asked = _asked(result)
    return 1000 * result["time"]["seconds"] / asked if asked else None


def unlike(results: Iterable[Row], keys: Iterable[str]) -> list[str]:
    """The keys in which not all of these results say the same."""
    rows = list(results)
    return [key for key in keys if len({json.dumps(row.get(key), sort_keys=True) for row in rows}) > 1]


def answered(results: Mapping[str, Mapping[Condition, Row]]) -> list[Row]:
    """Of results by task and condition: those with the right image whose score is a share of right answers."""
    right = [by_condition[Condition.right] for by_condition in results.values() if Condition.right in by_condition]
    return [result for result in right if not lower_is_better(result)]


def comparable_costs(entries: Iterable[Entry]) -> list[str]:
    """The entries of COSTS; milliseconds per question only where all of them were measured alike."""
    rows = [row for entry in entries if entry.last for row in answered(entry.last.results)]
    return [name for name in COSTS if name != "ms/question" or not unlike(rows, TIMING)]


def scored(entry: Entry, condition: Condition = Condition.right) -> dict[str, Row]:
    """Task -> result under the condition, of the last stage that was asked."""
    return {
        task: by_condition[condition]
        for stage in entry.stages
        for task, by_condition in stage.results.items()
        if condition in by_condition and by_condition[condition]["score"] is not None
    }


def lower_is_better(result: Row) -> bool:
    return str(result["metric"]).startswith("loss")


def answered_tasks(entries: Iterable[Entry]) -> list[str]:
    """Tasks of all entries whose score is a share of right answers."""
    return [task for task, result in _tasks(entries).items() if not lower_is_better(result)]


def loss_tasks(entries: Iterable[Entry]) -> list[str]:
    """Tasks of all entries whose score is a loss."""
    return [task for task, result in _tasks(entries).items() if lower_is_better(result)]


def scores(entry: Entry, tasks: Sequence[str]) -> dict[str, float | None]:
    """Score of each task with the right image."""
    results = scored(entry)
    return {task: results[task]["score"] if task in results else None for task in tasks}


def mean_score(entry: Entry, tasks: Sequence[str]) -> float | None:
    """Plain mean over the tasks; None unless all of them were scored."""
    values = list(scores(entry, tasks).values())
    return mean(values) if values and None not in values else None


def costs(entry: Entry) -> dict[str, float | None]:
    """The entries of COSTS: of the last stage, and of its questions with the right image."""
    results = [
        result for task in (entry.last.results.values() if entry.last else ())
        for condition, result in task.items() if condition is Condition.right
    ]  # fmt: skip
    return {
        "visual tokens": visual_tokens(results),
        "ms/question": ms_of_all(answered(entry.last.results)) if entry.last else None,
        "ms/sample": ms_per_sample(entry.last) if entry.last else None,
        "peak GiB": peak_memory(entry.last) if entry.last else None,
    }


def visual_tokens(results: Iterable[Row]) -> int | None:
    """Of an image, where all results say the same."""
    tokens = {result.get("visual_tokens_per_image") for result in results} - {None}
    return tokens.pop() if len(tokens) == 1 else None


def ms_of_all(results: Sequence[Row]) -> float | None:
    """Milliseconds per question over several results."""
    questions = sum(map(_asked, results))
    spent = sum(result["time"]["seconds"] for result in results if _asked(result))
    return 1000 * spent / questions if questions else None


def step_seconds(entry: Entry) -> float | None:
    """Seconds spent in the steps of all stages, also of one that is shared with other entries."""
    spent = [value for stage in entry.stages if (value := seconds(stage)) is not None]
    return sum(spent) if spent else None


def mean(values: Iterable[Any]) -> float | None:
    collected = list(values)
    return math.fsum(collected) / len(collected) if collected else None


def _asked(result: Row) -> int:
    """Questions that the result's seconds were spent on: without those that a killed evaluation had answered."""
    return int(result.get("n", 0) - result["time"].get("answered_before", 0))


def _window(stage: Stage) -> int:
    return min(WINDOW, max(1, len(stage.steps) // 2))


def _tasks(entries: Iterable[Entry]) -> Mapping[str, Row]:
    return {task: result for entry in entries for task, result in scored(entry).items()}
