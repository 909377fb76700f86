"""A trained stage as its folder tells it: record, scores, validation, anchor health, configuration, how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.config import Condition
from evals.report.files import read_flat, read_json, read_lines
from evals.results import SUBMISSIONS

Row = Mapping[str, Any]
STAGE_ORDER = ("align", "finetune")
ENDINGS = {
    "DONE": "done",
    "HALTED.json": "halted",
    "INTERRUPTED": "interrupted",
    "LOCK": "running or killed",
}
"""The file that says how a run stands, and what it says; the first that is there counts."""

STEP = ("step", "loss", "tokens", "samples", "time")
RESULT = ("task", "condition", "metric", "n_scored", "score", "time", "machine")
"""What lines of a record, and results of an evaluation, have to have."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run folder.

    Attributes:
        name: of the folder, which is the stage's (`align`, `finetune`).
        config: the resolved configuration by dotted key; empty where the folder has none.
        environment: likewise, of environment.json.
        steps: lines of metrics.jsonl without the names of the samples.
        health: lines of health.jsonl, what the anchors were like at a step.
        validation: lines of evals.jsonl, losses and scores while the run was training.
        results: task -> condition -> result of an evaluation of the trained model.
        variants: the same of evaluations with another selector or decoding, by the variant's name.
        state: how the run stands.
        notes: what a reader of the figures has to know: a line that was left out, a record that is empty.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    steps: Sequence[Row]
    health: Sequence[Row]
    validation: Sequence[Row]
    results: Mapping[str, Mapping[Condition, Row]]
    variants: Mapping[str, Mapping[str, Mapping[Condition, Row]]]
    state: str
    notes: tuple[str, ...]


def is_run(folder: Path) -> bool:
    """Whether ranks have been, or could be, started on the folder."""
    return (folder / "metrics.jsonl").is_file() or (folder / "config.yaml").is_file()


def read_stage(folder: Path) -> Stage:
    """Everything that the report wants of a run's folder.

    Raises:
        UserError: a file is there and cannot be read.
    """
    notes: list[str] = []
    steps = _lines(folder / "metrics.jsonl", STEP, notes)
    if not steps:
        notes.append("no step has been taken yet")
    return Stage(
        name=folder.name,
        path=folder,
        config=read_flat(folder / "config.yaml"),
        environment=read_flat(folder / "environment.json"),
        steps=steps,
        health=_lines(folder / "health.jsonl", ("step",), notes),
        validation=_lines(folder / "evals.jsonl", ("step",), notes),
        results=results(folder / "evals"),
        variants={
            path.name: found
            for path in sorted((folder / "evals").glob("*/"))
            if path.name != SUBMISSIONS and (found := results(path))
        },
        state=next((state for name, state in ENDINGS.items() if (folder / name).exists()), "not ended"),
        notes=tuple(notes),
    )


def _lines(path: Path, needs: Sequence[str], notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows, is_cut = read_lines(path, needs, without=("sample_ids",))
    if is_cut:
        notes.append(f"the last line of {path.name} is not complete and was left out")
    return rows


def results(folder: Path) -> dict[str, dict[Condition, dict[str, Any]]]:
    """Task -> condition -> result of an `evals/` folder; an evaluation of a part of a task is one of its own.

    Raises:
        UserError: a file cannot be read.
    """
    by_task: dict[str, dict[Condition, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem):
        result = read_json(path, RESULT)
        limit = result.get("limit")
        task = result["task"] if limit is None else f"{result['task']} (limit {limit})"
        by_task.setdefault(task, {})[Condition(result["condition"])] = result
    return by_task
