"""The tables of the report, and the Markdown page made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from evals.config import Condition
from evals.report import figures
from evals.report.asked import asked
from evals.report.entry import Entry
from evals.report.reading import Row, Stage
from evals.report.seeds import Group, seed_of, spread
from evals.report.table import Column, Table, Value, markdown

Timings = Mapping[str, float | Mapping[str, float]]
DECISIVE = ("n", "source", "first_prompt", "metric_variant", "decoding", "template", "precision")
"""What results of a task have to share before their scores are set side by side."""
NAMED = 4
"""Trials of a state that a note names."""


def training(entries: Sequence[Entry]) -> Table:
    """One row per stage of each entry."""
    columns = [
        Column("stage"), Column("steps", "d"), Column("loss at start", ".3f"), Column("loss at end", ".3f"),
        Column("tokens/s", ",.0f"), Column("samples/s", ",.1f"), Column("seconds", ",.1f"), Column("peak GiB", ".2f"),
        Column("state"),
    ]  # fmt: skip
    rows = [
        (
            stage.name, stage.steps[-1]["step"] if stage.steps else 0,
            figures.loss_at_start(stage), figures.loss_at_end(stage), figures.rate(stage, "tokens"),
            figures.rate(stage, "samples"), figures.seconds(stage), figures.peak_memory(stage), stage.state,
        )
        for _, stage in _stages(entries)
    ]  # fmt: skip
    return _named(entries, [entry for entry, _ in _stages(entries)], Table(
        "training", "Training", columns, rows,
        f"Losses are means over the first and the last {figures.WINDOW} steps, per supervised token. Seconds are those "
        "of the steps, memory is the most that any rank has held.",
    ))  # fmt: skip


def held_out(entries: Sequence[Entry]) -> Table:
    """One row per task that a stage was asked, with the baselines beside the score."""
    found = [
        (entry, stage, task, by_condition)
        for entry, stage in _stages(entries)
        for task, by_condition in stage.results.items()
    ]
    columns = [
        Column("after"), Column("task"), Column("metric"), Column("n", "d"), Column("right image", ".3f"),
        Column("shuffled image", ".3f"), Column("no image", ".3f"), Column("gain by the image", "+.3f"),
        Column("ms/question", ",.2f"),
    ]  # fmt: skip
    rows = []
    for _, stage, task, results in found:
        first = next(iter(results.values()))
        right = results.get(Condition.right)
        rows.append((
            stage.name, task, first["metric"], first["n_scored"],
            *(results[condition]["score"] if condition in results else None for condition in Condition),
            _gain(results), figures.ms_per_question(right) if right else None,
        ))  # fmt: skip
    return _named(entries, [entry for entry, *_ in found], Table(
        "scores", "Held-out scores", columns, rows,
        "The gain by the image is what the right one is better by than a shuffled one: right - shuffled, and for a "
        "loss, which is better when lower, shuffled - right.",
    ))  # fmt: skip


def overview(entries: Sequence[Entry]) -> Table:
    """One row per entry: what it is, what came of it, what it took."""
    answered, losses = figures.answered_tasks(entries), figures.loss_tasks(entries)
    axes = list(dict.fromkeys(axis for entry in entries for axis in entry.axes))
    # The axes say what a trial is; its id says where it lies.
    are_trials = all(entry.point for entry in entries) and len({entry.sweep for entry in entries}) == 1
    columns = [
        Column("trial" if are_trials else "run"), *(Column(axis) for axis in axes),
        *([] if "seed" in axes else [Column("seed")]), Column("state"), Column("last stage"),
        *(Column(task, ".3f") for task in answered), *(Column(f"{task} (loss)", ".3f") for task in losses),
        *([Column("mean of tasks", ".3f")] if len(answered) > 1 else []),
        Column("loss at end", ".3f"), Column("visual tokens", "d"), Column("ms/question", ",.2f"),
        Column("ms/sample", ",.2f"), Column("tokens/s", ",.0f"), Column("peak GiB", ".2f"),
        Column("step seconds", ",.1f"), Column("trial seconds", ",.1f"),
    ]  # fmt: skip
    rows: list[Sequence[Value]] = []
    for entry in entries:
        cost = figures.costs(entry)
        rows.append((
            entry.path.name if are_trials else entry.label, *(entry.axes.get(axis) for axis in axes),
            *([] if "seed" in axes else [seed_of(entry)]), entry.state, entry.last.name if entry.last else None,
            *figures.scores(entry, [*answered, *losses]).values(),
            *([figures.mean_score(entry, answered)] if len(answered) > 1 else []),
            figures.loss_at_end(entry.last) if entry.last else None, cost["visual tokens"], cost["ms/question"],
            cost["ms/sample"], figures.rate(entry.last, "tokens") if entry.last else None, cost["peak GiB"],
            figures.step_seconds(entry), entry.seconds,
        ))  # fmt: skip
    return Table(
        "runs", "Runs", columns, rows,
        "Scores are those with the right image. Loss, rates and memory are of the last stage, step seconds of all. "
        "What was not recorded is an empty cell.",
    )  # fmt: skip


def repetitions(groups: Sequence[Group], tasks: Sequence[str]) -> Table:
    """One row per group and task: every seed's score beside mean and spread."""
    columns = [
        Column("group"), Column("task"), Column("n", "d"), Column("mean", ".3f"), Column("sd", ".3f"),
        Column("seed: score"), Column("commits"),
    ]  # fmt: skip
    rows: list[Sequence[Value]] = []
    for group in groups:
        for task in tasks:
            values = [figures.scores(entry, [task])[task] for entry in group.entries]
            if found := spread(values):
                each = [
                    f"{seed}: {value:.3f}" for seed, value in zip(group.seeds, values, strict=True) if value is not None
                ]
                rows.append((
                    group.label, task, found.n, found.mean, found.deviation, ", ".join(each), len(_commits(group)),
                ))  # fmt: skip
    return Table(
        "seeds", "Seeds", columns, rows,
        "Runs of a group differ in nothing but seeds and names. sd is the standard deviation of a sample of n seeds; "
        "with so few, it is a rough figure, and no claim that a difference is significant. Commits is how many states "
        "of the code a group is made of.",
    )  # fmt: skip


def parts(timings: Timings, entries: Sequence[Entry]) -> Table:
    """Where the time went, as far as it was recorded; a stage that entries share counts once."""
    spent: dict[str, float] = {}
    for name, taken in timings.items():
        spent |= {name: taken} if isinstance(taken, float | int) else {f"{name}: {key}": n for key, n in taken.items()}
    owners: dict[Path, list[tuple[Entry, Stage]]] = {}
    for entry, stage in _stages(entries):
        owners.setdefault(stage.path, []).append((entry, stage))
    for path, ((entry, stage), *others) in owners.items():
        name = f"{stage.name} in {path.parent.name}" if others else _where(entry, stage, entries)
        spent[name] = figures.seconds(stage) or 0.0
        evaluated = [
            result["time"]["seconds"]
            for by_task in (stage.results, *stage.variants.values())
            for task in by_task.values() for result in task.values()
        ]  # fmt: skip
        if evaluated:
            spent[f"evaluation after {name}"] = sum(evaluated)
    rows = [*spent.items(), ("sum", sum(spent.values()))]
    return Table("seconds", "Seconds per part", [Column("part"), Column("seconds", ",.1f")], rows)


def notes(entries: Sequence[Entry]) -> list[str]:
    """What a reader has to know first, what is missing or damaged, and which entries failed."""
    told = [note for entry in entries for note in entry.notes]
    told += [
        f"{_where(entry, stage, entries)} {_standing(stage.state)}"
        for entry, stage in _stages(entries) if stage.state != "done"
    ]  # fmt: skip
    told += [f"{_where(entry, stage, entries)}: {note}" for entry, stage in _stages(entries) for note in stage.notes]
    told += [
        f"not asked alike everywhere, so that scores do not compare: {', '.join(tasks)} (different: {unlike})"
        for unlike, tasks in _unlike(entries).items()
    ]
    told += _timing(entries)
    unfinished: dict[str, list[str]] = {}
    for entry in entries:
        if entry.sweep and entry.state != "done":
            unfinished.setdefault(entry.state, []).append(entry.label)
    told += [
        f"{len(labels)} of {sum(entry.sweep is not None for entry in entries)} trials: {state} "
        f"({'; '.join(labels[:NAMED])}{'; …' * (len(labels) > NAMED)})" for state, labels in unfinished.items()
    ]  # fmt: skip
    return list(dict.fromkeys(told))


def machines(entries: Sequence[Entry]) -> list[str]:
    """On what, and with which versions, it was trained and evaluated."""
    environments = [stage.environment for _, stage in _stages(entries) if stage.environment]
    trained = {
        "Trained on {}: Python {}, {}; commit {}.".format(
            environment.get("host", "an unknown host"), environment.get("python", "unknown"),
            ", ".join(f"{key.removeprefix('versions.')} {value}" for key, value in environment.items()
                      if key.startswith("versions.")),
            environment.get("commit", "unknown"),
        )
        for environment in environments
    }  # fmt: skip
    evaluated = {
        result["machine"] for _, stage in _stages(entries) for task in stage.results.values()
        for result in task.values()
    }  # fmt: skip
    return [*sorted(trained), *([f"Evaluated on {'; '.join(sorted(evaluated))}."] if evaluated else [])]


def page(title: str, entries: Sequence[Entry], groups: Sequence[Group], timings: Timings) -> str:
    """The report as Markdown."""
    tables = [training(entries)]
    if len(entries) > 1:
        tables.insert(0, overview(entries))
    ways = asked(groups)
    if ways.rows:
        tables.insert(0, ways)
    scores = held_out(entries)
    if scores.rows:
        tables.append(scores)
    if any(len(group.entries) > 1 for group in groups):
        tables.append(repetitions(groups, [*figures.answered_tasks(entries), *figures.loss_tasks(entries)]))
    tables.append(parts(timings, entries))
    told = notes(entries)
    return "\n".join([
        f"# {title}\n",
        *([] if not told else ["\n".join(f"- {note}" for note in told) + "\n"]),
        *(block for table in tables for block in _section(table)),
        *([] if scores.rows else ["No task has been evaluated.\n"]),
        *(f"{line}\n" for line in machines(entries)),
    ])  # fmt: skip


def _section(table: Table) -> Iterable[str]:
    yield f"## {table.title}\n"
    yield markdown(table)
    if table.note:
        yield f"{table.note}\n"


def _stages(entries: Iterable[Entry]) -> list[tuple[Entry, Stage]]:
    return [(entry, stage) for entry in entries for stage in entry.stages]


def _named(entries: Sequence[Entry], rows: Sequence[Entry], table: Table) -> Table:
    """With the entry in front of each row, where there are several."""
    if len(entries) == 1:
        return table
    named = [(entry.label, *row) for entry, row in zip(rows, table.rows, strict=True)]
    return Table(table.name, table.title, [Column("run"), *table.columns], named, table.note)


def _gain(by_condition: Mapping[Condition, Row]) -> float | None:
    right, shuffled = (
        by_condition.get(condition, {}).get("score") for condition in (Condition.right, Condition.shuffled)
    )
    if right is None or shuffled is None:
        return None
    return float(shuffled - right if figures.lower_is_better(by_condition[Condition.right]) else right - shuffled)


def _unlike(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """What decides a score and is not the same in all results of a task -> the tasks of which that is true."""
    asked: dict[str, list[Row]] = {}
    for entry in entries:
        for task, result in figures.scored(entry).items():
            asked.setdefault(task, []).append(result)
    found: dict[str, list[str]] = {}
    for task, results in asked.items():
        if unlike := figures.unlike(results, DECISIVE):
            found.setdefault(", ".join(unlike), []).append(task)
    return found


def _timing(entries: Sequence[Entry]) -> Iterable[str]:
    """What the milliseconds per question are of, where that is not the whole model on one machine."""
    results = [
        row for entry in entries if entry.last
        for by_task in (entry.last.results, *entry.last.variants.values()) for row in figures.answered(by_task)
    ]  # fmt: skip
    if unlike := figures.unlike(results, figures.TIMING):
        yield f"not measured alike everywhere, so that ms/question do not compare (different: {', '.join(unlike)})"
    elif results and results[0].get("vision_features") == "cached":
        yield "ms/question are without the vision tower, whose features came from the cache"


def _commits(group: Group) -> set[str]:
    return {str(stage.environment["commit"]) for _, stage in _stages(group.entries) if "commit" in stage.environment}


def _where(entry: Entry, stage: Stage, entries: Sequence[Entry]) -> str:
    return stage.name if len(entries) == 1 else f"{entry.label}: {stage.name}"


def _standing(state: str) -> str:
    return {"not ended": "has not ended", "halted": "was halted", "interrupted": "was interrupted"}.get(
        state, f"is {state}"
    )
