"""`python -m evals.report FOLDER`: what came of a run, from its files alone, as report.md and on the terminal."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError, run_guarded
from evals.config import Condition

STAGE_ORDER = ("align", "finetune")
TIMINGS = "timings.json"
"""Seconds of the parts that are no stages, kept in the folder from the report that was told them."""
WINDOW = 10
"""Steps over which the losses at the start and at the end are averaged."""
Row = Sequence[str]
Timings = Mapping[str, float | Mapping[str, float]]
Steps = Mapping[str, Sequence[Mapping[str, Any]]]
Results = Mapping[str, Mapping[str, Mapping[Condition, Mapping[str, Any]]]]


def report(folder: Path, timings: Timings | None = None) -> str:
    """The report of a run folder, or of the folder that holds a run's stages, as Markdown.

    Args:
        timings: seconds of the parts that are no stages, a number or numbers by name; None is what the folder keeps.

    Raises:
        UserError: no stage has been trained there, or one of the files cannot be read.
    """
    stages = _stages(folder)
    steps = {name: _steps(path / "metrics.jsonl") for name, path in stages.items()}
    results = {name: _results(path / "evals") for name, path in stages.items()}
    if timings is None:
        timings = _json(folder / TIMINGS) if (folder / TIMINGS).is_file() else {}
    environments = [_json(path / "environment.json") for path in stages.values()]
    return "\n".join(
        [
            f"# {folder.name}\n",
            "## Training\n",
            _table(
                ("stage", "steps", "loss at start", "loss at end", "tokens/s", "samples/s", "seconds"),
                [_stage_row(name, rows) for name, rows in steps.items()],
            ),
            f"Losses are means over the first and the last {WINDOW} steps, per supervised token.\n",
            *_accuracies(results),
            "## Seconds per part\n",
            _table(("part", "seconds"), list(_seconds(timings, steps, results))),
            *_machines(environments, results),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of a run's stages (checkpoints/<run>) or of one stage")
    parser.add_argument(
        "--seconds",
        action="append",
        default=[],
        metavar="PART=FILE",
        help="also show how long a part took that is no stage: a JSON file with `seconds` (may be given again); "
        "later reports of the folder remember it",
    )
    options = parser.parse_args()
    folder = options.folder
    timings = read_timings(options.seconds) if options.seconds else None
    text = report(folder, timings)
    if timings is not None:
        _replace(folder / TIMINGS, json.dumps(timings, indent=2) + "\n")
    _replace(folder / "report.md", text)
    print(text)
    print(f"written to {folder / 'report.md'}")
    return 0


def read_timings(parts: Sequence[str]) -> Timings:
    """PART=FILE ... as part -> what the JSON file says under `seconds`: a number, or numbers by name.

    Raises:
        UserError: not written like that, or a file that cannot be read or has no `seconds`.
    """
    timings = {}
    for text in parts:
        part, _, name = text.partition("=")
        if not part or not name:
            raise UserError(
                "--seconds names no file", found=text, expected="PART=FILE", remedy="e.g. --seconds install=times.json"
            )
        seconds = _json(Path(name)).get("seconds")
        if seconds is None:
            raise _unreadable(Path(name), "no `seconds` in it")
        timings[part] = seconds
    return timings


def _stages(folder: Path) -> dict[str, Path]:
    below = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
    found = [folder] if (folder / "metrics.jsonl").is_file() else below
    runs = sorted({path.parents[1] for path in folder.glob("*/*/metrics.jsonl")})
    if runs and found != [folder]:
        raise UserError(
            f"{folder} holds runs, and is none itself",
            found=", ".join(path.name for path in [*below, *runs]),
            expected="the folder of one run",
            remedy="pass " + ("one of " if len(below) + len(runs) > 1 else "") + ", ".join(map(str, [*below, *runs])),
        )
    if not found:
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise UserError(
            f"nothing to report in {folder}",
            found=there,
            expected="metrics.jsonl of a run, in the folder or in its align/ and finetune/",
            remedy="train first, then pass the run's folder",
        )
    rank = {name: position for position, name in enumerate(STAGE_ORDER)}
    return {path.name: path for path in sorted(found, key=lambda path: (rank.get(path.name, 99), path.name))}


def _steps(path: Path) -> list[dict[str, Any]]:
    text = path.read_text("utf-8")
    rows = []
    # A kill can cut the last line short; the resumed run writes that step again.
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise _unreadable(path, f"line {number}: {error}") from None
    if not rows:
        raise _unreadable(path, "no step in it")
    return rows


def _stage_row(name: str, rows: Sequence[Mapping[str, Any]]) -> Row:
    window = min(WINDOW, max(1, len(rows) // 2))
    seconds = sum(row["time"]["seconds"] for row in rows)
    tokens, samples = sum(row["tokens"] for row in rows), sum(row["samples"] for row in rows)
    return (
        name,
        str(rows[-1]["step"]),
        f"{_mean(row['loss'] for row in rows[:window]):.3f}",
        f"{_mean(row['loss'] for row in rows[-window:]):.3f}",
        f"{tokens / seconds:,.0f}",
        f"{samples / seconds:,.1f}",
        f"{seconds:,.1f}",
    )


def _results(folder: Path) -> dict[str, dict[Condition, dict[str, Any]]]:
    by_task: dict[str, dict[Condition, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem):
        result = _json(path)
        limit = result.get("limit")
        task = result["task"] if limit is None else f"{result['task']} (limit {limit})"
        by_task.setdefault(task, {})[Condition(result["condition"])] = result
    return by_task


def _accuracies(results: Results) -> Iterable[str]:
    rows = [
        (
            stage,
            task,
            by_condition[next(iter(by_condition))]["metric"],
            str(by_condition[next(iter(by_condition))]["n_scored"]),
            *(_score(by_condition.get(condition)) for condition in Condition),
            _gain(by_condition),
        )
        for stage, tasks in results.items()
        for task, by_condition in tasks.items()
    ]
    if not rows:
        return ["No task has been evaluated.\n"]
    header = ("after", "task", "metric", "n", "right image", "shuffled image", "no image", "gain by the image")
    return [
        "## Held-out scores\n",
        _table(header, rows),
        "The gain by the image is what the right one is better by than a shuffled one: right - shuffled, and for a "
        "loss, which is better when lower, shuffled - right.\n",
    ]


def _score(result: Mapping[str, Any] | None) -> str:
    return "" if result is None or result["score"] is None else f"{result['score']:.3f}"


def _gain(by_condition: Mapping[Condition, Mapping[str, Any]]) -> str:
    right, shuffled = (
        by_condition.get(condition, {}).get("score") for condition in (Condition.right, Condition.shuffled)
    )
    if right is None or shuffled is None:
        return ""
    lower_is_better = by_condition[Condition.right]["metric"].startswith("loss")
    return f"{shuffled - right if lower_is_better else right - shuffled:+.3f}"


def _seconds(timings: Timings, steps: Steps, results: Results) -> Iterable[Row]:
    parts: dict[str, float] = {}
    for name, taken in timings.items():
        parts |= {name: taken} if isinstance(taken, float | int) else {f"{name}: {key}": n for key, n in taken.items()}
    for stage, rows in steps.items():
        parts[stage] = sum(row["time"]["seconds"] for row in rows)
        spent = [result["time"]["seconds"] for task in results[stage].values() for result in task.values()]
        if spent:
            parts[f"evaluation after {stage}"] = sum(spent)
    yield from ((part, f"{seconds:,.1f}") for part, seconds in parts.items())
    yield ("sum", f"{sum(parts.values()):,.1f}")


def _machines(environments: Sequence[Mapping[str, Any]], results: Results) -> Iterable[str]:
    first = environments[0]
    names = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    hosts = ", ".join(sorted({environment["host"] for environment in environments}))
    yield f"Trained on {hosts}: Python {first['python']}, {names}; commit {first['commit']}.\n"
    evaluated = {result["machine"] for stage in results.values() for task in stage.values() for result in task.values()}
    if evaluated:
        yield f"Evaluated on {'; '.join(sorted(evaluated))}.\n"


def _table(header: Row, rows: Sequence[Row]) -> str:
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(not cell or cell.lstrip("+-")[:1].isdigit() for cell in column[1:]) for column in columns]
    rule = [("-" * (width - 1) + ":") if right else "-" * width for width, right in zip(widths, numeric, strict=True)]

    def line(row: Row) -> str:
        cells = zip(row, widths, numeric, strict=True)
        return f"| {' | '.join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells)} |"

    return "\n".join([line(header), line(rule), *map(line, rows)]) + "\n"


def _mean(values: Iterable[float]) -> float:
    collected = list(values)
    return sum(collected) / len(collected)


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, "utf-8")
    beside.replace(path)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from None


def _unreadable(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path} cannot be read",
        found=problem,
        expected="the file as the run wrote it",
        remedy="run the step that writes it again",
    )


if __name__ == "__main__":
    run_guarded(main)
