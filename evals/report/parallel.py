"""Parallel coordinates of a sweep: one line per trial through its point, its scores and its costs.

Drawn with ordinary lines: Plotly's own trace for it needs WebGL, which a machine without graphics may not have, and
evaluates generated code, which the page's content policy forbids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evals.report import figures
from evals.report.entry import Entry
from evals.report.plots import Plot

LOW_TO_HIGH = ("#7b52ab", "#3f74b5", "#21918c", "#5ec962", "#e0c91f")
"""After viridis, whose order any colour vision sees; lighter at the low end, which would vanish on a dark ground."""


def parallel(entries: Sequence[Entry]) -> Plot | None:
    """Of the trials that have been scored; axes on which all are alike are left out."""
    tasks = figures.answered_tasks(entries)
    trials = [entry for entry in entries if entry.point and set(tasks) & figures.scored(entry).keys()]
    if len(trials) < 2:
        return None
    dimensions = {axis: [entry.axes.get(axis) for entry in trials] for axis in _axes(trials)}
    dimensions |= {name: [figures.costs(entry)[name] for entry in trials] for name in figures.comparable_costs(trials)}
    dimensions["loss at end"] = [figures.loss_at_end(entry.last) if entry.last else None for entry in trials]
    dimensions |= {task: [figures.scores(entry, [task])[task] for entry in trials] for task in tasks}
    if len(tasks) > 1:
        dimensions["mean of tasks"] = [figures.mean_score(entry, tasks) for entry in trials]
    dimensions = {name: values for name, values in dimensions.items() if len({str(value) for value in values}) > 1}
    if len(dimensions) < 2:
        return None
    scales = {name: Scale(values) for name, values in dimensions.items()}
    last = list(dimensions)[-1]
    return Plot(
        "parallel", "The sweep in parallel coordinates",
        f"One line per trial, coloured by {last}. Drag a box over a part of an axis to keep the lines that cross it; "
        "a double click brings the others back. A trial has no mark on an axis where nothing was recorded.",
        {"": {
            "data": [_line(entry.label, [values[i] for values in dimensions.values()], scales, last)
                     for i, entry in enumerate(trials)],
            "layout": _layout(scales),
        }},
    )  # fmt: skip


class Scale:
    """Where a value lies between the bottom (0) and the top (1) of its axis; words are evenly spaced.

    Args:
        values: all values of the axis, None among them.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        there = [value for value in values if value is not None]
        self.is_numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in there)
        self.steps: list[Any] = sorted(set(there)) if self.is_numeric else list(dict.fromkeys(map(str, there)))

    def place(self, value: Any) -> float | None:
        if value is None:
            return None
        if not self.is_numeric:
            return self.steps.index(str(value)) / max(1, len(self.steps) - 1)
        low, high = self.steps[0], self.steps[-1]
        return float((value - low) / (high - low)) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Place and text: each word and each of a few numbers, else the ends and the middle."""
        if not self.is_numeric or len(self.steps) <= 5:
            return [(self.place(step) or 0.0, said(step)) for step in self.steps]
        low, high = self.steps[0], self.steps[-1]
        return [(share, said(low + share * (high - low))) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]


def said(value: Any) -> str:
    return "not recorded" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _axes(trials: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(axis for entry in trials for axis in entry.axes))


def _line(label: str, values: Sequence[Any], scales: dict[str, Scale], last: str) -> dict[str, Any]:
    place = scales[last].place(values[-1])
    colour = "#888888" if place is None else LOW_TO_HIGH[round(place * (len(LOW_TO_HIGH) - 1))]
    return {
        "type": "scatter", "mode": "lines+markers", "name": label, "x": list(range(len(values))),
        "y": [scale.place(value) for scale, value in zip(scales.values(), values, strict=True)],
        "text": [f"{name}: {said(value)}" for name, value in zip(scales, values, strict=True)],
        "line": {"color": colour, "width": 2}, "marker": {"color": colour, "size": 7}, "connectgaps": True,
        "hovertemplate": "%{fullData.name}<br>%{text}<extra></extra>",
    }  # fmt: skip


def _layout(scales: dict[str, Scale]) -> dict[str, Any]:
    """An upright for each axis, its ticks written beside it."""
    ticks = [(x, *tick) for x, scale in enumerate(scales.values()) for tick in scale.ticks()]
    return {
        "showlegend": False, "dragmode": "select", "hovermode": "closest",
        "xaxis": {"tickvals": list(range(len(scales))), "ticktext": list(scales), "showgrid": False, "zeroline": False,
                  "range": [-0.3, len(scales) - 0.1]},
        "yaxis": {"visible": False, "range": [-0.08, 1.08]},
        "shapes": [{"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "layer": "below",
                    "line": {"color": "#888888", "width": 1}} for x in range(len(scales))],
        "annotations": [{"x": x, "y": y, "text": text, "showarrow": False, "xanchor": "right", "xshift": -7,
                         "font": {"size": 11}} for x, y, text in ticks],
    }  # fmt: skip
