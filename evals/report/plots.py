"""What the report draws, as Plotly figures in plain JSON; the page draws them, so nothing here needs Plotly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from evals.config import Condition
from evals.report import figures
from evals.report.entry import Entry
from evals.report.seeds import Group, spread

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito (2008), for any colour vision; without yellow and black, which vanish on one of the grounds."""
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
MEAN = "mean of tasks"


@dataclass(frozen=True)
class Plot:
    """A figure, or one for each combination of choices.

    Attributes:
        name: its place on the page.
        choices: what is chosen -> the options.
        variants: a Plotly figure for the options' positions, joined by commas; "" where there is no choice. A
            combination that has nothing to show is absent.
    """

    name: str
    title: str
    note: str
    variants: Mapping[str, Mapping[str, Any]]
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)


def colour(position: int) -> str:
    return COLOURS[position % len(COLOURS)]


def style(position: int) -> dict[str, Any]:
    """A line of its own for each position: colours first, then dashes."""
    return {"color": colour(position), "dash": DASHES[position // len(COLOURS) % len(DASHES)], "width": 2}


def marker(position: int, size: int, opacity: float = 1.0) -> dict[str, Any]:
    """A mark of its own for each position: colours with shapes, so that neither is needed alone."""
    symbol = SYMBOLS[position % len(SYMBOLS)]
    return {"color": colour(position), "symbol": symbol, "size": size, "opacity": opacity}


def conditions(entries: Sequence[Entry]) -> Plot | None:
    """Scores with the right image beside those with a wrong one and with none."""
    choices = [entry.label for entry in entries]
    variants = {}
    for position, entry in enumerate(entries):
        tasks = figures.answered_tasks([entry])
        if not tasks:
            continue
        bars = []
        for place, condition in enumerate(Condition):
            results = figures.scored(entry, condition)
            if not set(tasks) & results.keys():
                continue
            bars.append({
                "type": "bar", "name": f"{condition.value} image" if condition is not Condition.none else "no image",
                "x": tasks, "y": [results[task]["score"] if task in results else None for task in tasks],
                "marker": {"color": ("#0072b2", "#e69f00", "#999999")[place]},
                "hovertemplate": "%{x}: %{y:.3f}<extra>%{fullData.name}</extra>",
            })  # fmt: skip
        layout = {"barmode": "group", "yaxis": {"title": {"text": "score"}, "rangemode": "tozero"}}
        variants[_key(position, choices)] = {"data": bars, "layout": layout}
    if not variants:
        return None
    return Plot(
        "conditions", "What the image is worth",
        "The same questions with their own image, with another image of the task, and without one.",
        variants, {"run": choices} if len(choices) > 1 else {},
    )  # fmt: skip


def pareto(groups: Sequence[Group]) -> Plot | None:
    """Score against what it costs; the line joins the groups that no other one beats in both."""
    tasks = figures.answered_tasks(entry for group in groups for entry in group.entries)
    scores = ([MEAN] if len(tasks) > 1 else []) + tasks
    costs = figures.comparable_costs(entry for group in groups for entry in group.entries)
    found = {
        (i, j): figure
        for i, score in enumerate(scores)
        for j, cost in enumerate(costs)
        if (figure := _weighed(groups, score, cost, tasks))
    }
    if not found:
        return None
    # Only what at least two groups have recorded can be chosen.
    ranked, weighed = sorted({i for i, _ in found}), sorted({j for _, j in found})
    return Plot(
        "pareto", "Score against cost",
        "Small marks are single runs, large ones the mean over the seeds of a group. The line joins the groups that no "
        "other group beats in both. Times and memory are as recorded, on the machines named below; milliseconds per "
        "question are no choice where they were not measured alike.",
        {f"{ranked.index(i)},{weighed.index(j)}": figure for (i, j), figure in found.items()},
        {"score": [scores[i] for i in ranked], "cost": [figures.COSTS[costs[j]] for j in weighed]},
    )  # fmt: skip


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, score): those that no other is at most as costly and at least as good as, by cost."""
    best: list[tuple[float, float]] = []
    for cost, score in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not best or score > best[-1][1]:
            best.append((cost, score))
    return best


def _weighed(groups: Sequence[Group], score: str, cost: str, tasks: Sequence[str]) -> dict[str, Any] | None:
    singles, means, labels = [], [], []
    for position, group in enumerate(groups):
        points = [
            (x, y) for entry in group.entries
            if (x := figures.costs(entry)[cost]) is not None and (y := _score(entry, score, tasks)) is not None
        ]  # fmt: skip
        if not points:
            continue
        middle = (fmean(x for x, _ in points), fmean(y for _, y in points))
        if len(points) > 1:
            singles.append(_points(group.label, points, marker(position, 7, 0.45), legend=False))
        means.append((middle, position))
        labels.append(group.label)
    if len(means) < 2:
        return None  # one point is weighed against nothing
    line = front([middle for middle, _ in means])
    data: list[dict[str, Any]] = [{
        "type": "scatter", "mode": "lines", "name": "not beaten in both", "hoverinfo": "skip",
        "x": [x for x, _ in line], "y": [y for _, y in line], "line": {"color": "#888888", "dash": "dot", "width": 1.5},
    }]  # fmt: skip
    data += singles
    data += [
        _points(label, [middle], marker(position, 13), legend=True)
        for label, (middle, position) in zip(labels, means, strict=True)
    ]
    return {
        "data": data,
        "layout": {"xaxis": {"title": {"text": figures.COSTS[cost]}}, "yaxis": {"title": {"text": score}}},
    }


def _points(label: str, points: Sequence[Any], mark: Mapping[str, Any], *, legend: bool) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "markers", "name": label, "legendgroup": label, "showlegend": legend,
        "x": [x for x, _ in points], "y": [y for _, y in points], "marker": mark,
        "hovertemplate": "%{fullData.name}<br>%{x:.4g}, %{y:.3f}<extra></extra>",
    }  # fmt: skip


def _score(entry: Entry, score: str, tasks: Sequence[str]) -> float | None:
    return figures.mean_score(entry, tasks) if score == MEAN else figures.scores(entry, [score])[score]


def seeds(groups: Sequence[Group]) -> Plot | None:
    """Every seed's score, beside mean and standard deviation of its group."""
    if all(len(group.entries) == 1 for group in groups):
        return None
    tasks = figures.answered_tasks(entry for group in groups for entry in group.entries)
    choices = ([MEAN] if len(tasks) > 1 else []) + tasks
    variants = {}
    for choice, score in enumerate(choices):
        data: list[dict[str, Any]] = []
        for position, group in enumerate(groups):
            values = [_score(entry, score, tasks) for entry in group.entries]
            found = spread(values)
            if found is None:
                continue
            data.append({
                "type": "scatter", "mode": "markers", "name": group.label, "y": [group.label] * len(values),
                "x": values, "text": [f"seed {seed}" for seed in group.seeds], "marker": marker(position, 8, 0.6),
                "hovertemplate": "%{text}: %{x:.3f}<extra></extra>",
            })  # fmt: skip
            data.append({
                "type": "scatter", "mode": "markers", "y": [group.label], "x": [found.mean],
                "error_x": {"type": "data", "array": [found.deviation], "thickness": 1.5, "width": 6},
                "marker": {"symbol": "line-ns", "size": 22, "line": {"width": 2.5, "color": colour(position)},
                           "color": colour(position)},
                "hovertemplate": f"mean of {found.n}: %{{x:.3f}}<extra></extra>", "name": f"{group.label}: mean",
            })  # fmt: skip
        if data:
            variants[_key(choice, choices)] = {
                "data": data,
                "layout": {
                    "showlegend": False,
                    "xaxis": {"title": {"text": score}},
                    "yaxis": {"type": "category", "autorange": "reversed", "dtick": 1},
                    "height": max(420, 120 + 28 * len(groups)),
                },
            }
    if not variants:
        return None
    return Plot(
        "spread", "Spread over seeds",
        "Each mark is one seed; the bar is the mean, whiskers are one standard deviation of a sample to either side.",
        variants, {"score": choices} if len(choices) > 1 else {},
    )  # fmt: skip


def _key(position: int, options: Sequence[str]) -> str:
    return str(position) if len(options) > 1 else ""
