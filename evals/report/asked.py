"""The table of every way in which trained models were asked: with what they were trained, and otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from evals.config import Condition
from evals.report import figures
from evals.report.entry import Entry
from evals.report.reading import Row
from evals.report.seeds import Group
from evals.report.table import Column, Table, Value

OWN = "as trained"


def asked(groups: Sequence[Group]) -> Table:
    """One row per group and way; no rows where every model was asked as it was trained."""
    ways = [(group, way, found) for group in groups for way, found in _ways(group.entries).items()]
    tasks = list(dict.fromkeys(
        task for _, _, found in ways for results in found for task, row in results.items()
        if not figures.lower_is_better(row)
    ))  # fmt: skip
    columns = [
        Column("run"), Column("asked"), Column("seeds", "d"), *(Column(task, ".3f") for task in tasks),
        *([Column("mean of tasks", ".3f")] if len(tasks) > 1 else []), Column("visual tokens", "d"),
        Column("ms/question", ",.2f"), Column("peak GiB", ".3f"),
    ]  # fmt: skip
    rows = [(group.label, way, len(found), *_figures(found, tasks)) for group, way, found in ways]
    return Table(
        "asked", "How models were asked", columns, rows if {way for _, way, _ in ways} - {OWN} else [],
        "A row per way in which a trained model was asked, right images; scores and milliseconds are means over "
        "seeds. What is not as trained was put before the connector, or decoded, without any training. Milliseconds "
        "are those of answers in batches; memory is the most that a process of the evaluation has held.",
    )  # fmt: skip


def _ways(entries: Sequence[Entry]) -> dict[str, list[Mapping[str, Row]]]:
    """Way -> for each seed that was asked so, task -> result with the right image."""
    found: dict[str, list[Mapping[str, Row]]] = {}
    for entry in entries:
        for way, by_task in _results(entry):
            right = {task: row[Condition.right] for task, row in by_task.items() if Condition.right in row}
            if right:
                found.setdefault(way, []).append(right)
    return found


def _results(entry: Entry) -> Iterator[tuple[str, Mapping[str, Mapping[Condition, Row]]]]:
    if entry.last is not None:
        yield OWN, entry.last.results
        yield from entry.last.variants.items()


def _figures(found: Sequence[Mapping[str, Row]], tasks: Sequence[str]) -> Iterator[Value]:
    scores = [figures.mean(results[task]["score"] for results in found if task in results) for task in tasks]
    yield from scores
    if len(tasks) > 1:
        yield figures.mean(score for score in scores if score is not None) if None not in scores else None
    answered = [row for results in found for row in results.values() if not figures.lower_is_better(row)]
    yield figures.visual_tokens(answered)
    yield figures.ms_of_all(answered)
    yield max((row["time"]["peak_memory_gib"] for row in answered if "peak_memory_gib" in row["time"]), default=None)
