"""How tests read the traces that a profiled run has left."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Events of a trace in Chrome's format, each of them whole."""
    with gzip.open(path, "rt") as file:
        told = json.load(file)
    events: list[dict[str, Any]] = told["traceEvents"]
    for event in events:
        assert {"name", "ph", "pid", "tid"} <= event.keys() or event["ph"] in "sft"
        if event["ph"] == "X":
            assert event["dur"] >= 0
    return events


def ranges(events: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Name -> begin and end of every range that the run's own code names, in order."""
    found: dict[str, list[tuple[float, float]]] = {}
    for event in sorted((event for event in events if event.get("cat") == "user_annotation"), key=_begin):
        found.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found


def _begin(event: dict[str, Any]) -> float:
    return float(event["ts"])
