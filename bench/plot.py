"""Bars as SVG: a few rectangles and words, readable in the documentation without any plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from bench.table import show

ROW, BAR, TOP = 22, 14, 46
LABELS, PLOT, VALUES = 470, 420, 90
OURS, OTHER, MISSED = "#2b6cb0", "#a0aec0", "#c05621"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One value.

    Attributes:
        goal: what the value should reach; drawn as a tick.
        spread: drawn as a line from so much below the value to so much above.
        colour: of the bar.
    """

    label: str
    value: float
    goal: float | None = None
    spread: float | None = None
    colour: str = OURS


def bars(title: str, unit: str, content: Sequence[Bar], *, logarithmic: bool = False) -> str:
    """An SVG document.

    Args:
        unit: written behind each value.
        logarithmic: bars of equal ratios differ by equal lengths, and those below 1 go to the left.
    """
    known = [value for bar in content for value in (bar.value + (bar.spread or 0), bar.goal) if value is not None]
    low, high = (min([0.8, *known]), max([1.25, *known])) if logarithmic else (0.0, max([*known, 1e-12]))

    def place(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if logarithmic else value / high
        return round(LABELS + PLOT * share, 1)

    zero = place(1.0) if logarithmic else LABELS
    height = TOP + ROW * len(content) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABELS + PLOT + VALUES}" height="{height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="24" font-size="15">{escape(title)}</text>',
        f'<line x1="{zero}" y1="{TOP - 8}" x2="{zero}" y2="{height - 8}" stroke="#4a5568"/>',
    ]
    for number, bar in enumerate(content):
        y = TOP + ROW * number
        left, right = sorted((zero, place(bar.value)))
        middle, end = y + BAR - 3, max(right, place(bar.value + (bar.spread or 0)))
        lines += [
            f'<text x="{LABELS - 8}" y="{middle}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect x="{left}" y="{y}" width="{round(right - left, 1)}" height="{BAR}" fill="{bar.colour}"/>',
            f'<text x="{end + 6}" y="{middle}">{escape(show(bar.value))}{escape(unit)}</text>',
        ]
        if bar.spread is not None:
            ends, level = (place(bar.value - bar.spread), place(bar.value + bar.spread)), y + BAR / 2
            lines.append(f'<line x1="{ends[0]}" y1="{level}" x2="{ends[1]}" y2="{level}" stroke="black"/>')
        if bar.goal is not None:
            x = place(bar.goal)
            lines.append(f'<line x1="{x}" y1="{y - 3}" x2="{x}" y2="{y + BAR + 3}" stroke="black" stroke-width="2"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"
