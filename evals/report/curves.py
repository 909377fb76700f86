"""Curves over the steps of a run, thinned so that a page stays small."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evals.report.files import flat
from evals.report.plots import Plot, style
from evals.report.reading import Row, Stage
from evals.report.seeds import Group

POINTS = 240
"""Points of a curve at most; longer ones are means over as many steps as it takes."""
COUNTS = ("step", "n", "n_scored", "images")
"""Numbers of a record that say how much was looked at, not what was seen."""
LOSS, NORM = "loss per supervised token", "gradient norm (largest)"
Curve = tuple[list[float], list[float | None]]


def curves(groups: Sequence[Group]) -> list[Plot]:
    """One plot per name of a stage, with a choice of what is drawn; seeds of a group are drawn alike."""
    names = dict.fromkeys(stage.name for group in groups for entry in group.entries for stage in entry.stages)
    return [plot for name in names if (plot := _of_stage(name, groups))]


def thin(xs: Sequence[float], ys: Sequence[float | None], *, by_largest: bool = False) -> Curve:
    """At most POINTS points: each the mean (or largest) of the finite values of a run of neighbours, at its last x."""
    width = math.ceil(len(xs) / POINTS)
    if width <= 1:
        return list(xs), [_finite(y) for y in ys]
    thinned: Curve = ([], [])
    for start in range(0, len(xs), width):
        values = [y for y in map(_finite, ys[start : start + width]) if y is not None]
        thinned[0].append(xs[min(start + width, len(xs)) - 1])
        thinned[1].append(None if not values else max(values) if by_largest else math.fsum(values) / len(values))
    return thinned


def _of_stage(name: str, groups: Sequence[Group]) -> Plot | None:
    sharing = Counter(stage.path for group in groups for entry in group.entries for stage in entry.stages)
    drawn: dict[str, list[dict[str, Any]]] = {}
    seen = set()
    longest = 0
    for position, entry in ((position, entry) for position, group in enumerate(groups) for entry in group.entries):
        for stage in entry.stages:
            if stage.name != name or stage.path in seen:
                continue
            seen.add(stage.path)
            longest = max(longest, len(stage.steps))
            others = sharing[stage.path] - 1
            label = f"{entry.label} and {others} more" if others else entry.label
            for what, (xs, ys) in _series(stage).items():
                drawn.setdefault(what, []).append({
                    "type": "scatter", "mode": "lines" if len(xs) > 1 else "markers", "name": label, "x": xs, "y": ys,
                    "line": style(position), "marker": {"color": style(position)["color"]},
                    "hovertemplate": "step %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
                })  # fmt: skip
    if not drawn:
        return None
    choices = list(drawn)
    width = math.ceil(longest / POINTS)
    note = (
        f"Each point is the mean over up to {width} steps, so a spike of one step shows only in the gradient norm, "
        "where it is the largest." if width > 1 else "Each point is one step."
    )  # fmt: skip
    return Plot(
        f"curves-{name}", f"Training: {name}", note,
        {(str(i) if len(choices) > 1 else ""): {
            "data": drawn[what],
            "layout": {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": what}},
                       "showlegend": len(drawn[what]) > 1},
        } for i, what in enumerate(choices)},
        {"curve": choices} if len(choices) > 1 else {},
    )  # fmt: skip


def _series(stage: Stage) -> dict[str, Curve]:
    """What can be drawn of a stage: name -> steps and values."""
    found = {
        LOSS: _column(stage.steps, lambda row: row["loss"]),
        NORM: _column(stage.steps, lambda row: row.get("grad_norm"), by_largest=True),
        "learning rate (largest)": _column(stage.steps, lambda row: max(row.get("lr", {}).values(), default=None)),
        "tokens per second": _column(stage.steps, lambda row: row["time"].get("tokens_per_second")),
        "peak memory (GiB, fullest rank)": _column(stage.steps, lambda row: row["time"].get("peak_memory_gib")),
    }
    for kind, rows in (("validation", stage.validation), ("anchors", stage.health)):
        for key, (xs, ys) in _numbers(rows).items():
            found[f"{kind}: {key}"] = thin(xs, ys)
    return {name: curve for name, curve in found.items() if any(y is not None for y in curve[1])}


def _column(rows: Iterable[Row], value: Any, *, by_largest: bool = False) -> Curve:
    pairs = [(row["step"], value(row)) for row in rows]
    return thin([x for x, _ in pairs], [y for _, y in pairs], by_largest=by_largest)


def _numbers(rows: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Numbers of records by name; a record that names a dataset or task has that in front."""
    found: dict[str, Curve] = {}
    for row in rows:
        about = next((str(row[key]) + " " for key in ("dataset", "task") if key in row), "")
        for key, value in flat(dict(row)).items():
            if key in COUNTS or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            xs, ys = found.setdefault(about + key, ([], []))
            xs.append(row["step"])
            ys.append(float(value))
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
