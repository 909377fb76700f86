"""The same images and questions across what is compared: overlays of the anchors, answers beside references."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from evals.config import Condition
from evals.report import figures
from evals.report.entry import Entry
from evals.report.files import read_lines, unreadable
from evals.report.seeds import Group

MAX_IMAGES, MAX_COLUMNS = 8, 8
"""Images and groups that are shown at most; a page has to open."""
MAX_SIDE = 384
"""Pixels of an overlay's longer side on the page."""
MAX_PIXELS = 2**24
"""Largest overlay that is opened."""
PREDICTION = ("id", "prediction", "references", "score")
QUESTIONS = 6
"""Questions of each task whose answers are shown."""


@dataclass(frozen=True)
class Overlay:
    """One image as one model saw it.

    Attributes:
        image: PNG as a data URI.
        caption: question, answer and reference.
    """

    image: str
    caption: Mapping[str, str]


@dataclass(frozen=True)
class Gallery:
    """Rows of the same image, columns of groups; a cell that was not recorded is None."""

    columns: Sequence[str]
    rows: Mapping[str, Sequence[Overlay | None]]
    notes: Sequence[str]


@dataclass(frozen=True)
class Answers:
    """The answers of each column to the same questions of a task.

    Attributes:
        rows: (question's id, references, answers); an answer is its text and its score, or None.
    """

    task: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[tuple[str, float | None] | None]]]


def gallery(groups: Sequence[Group]) -> Gallery | None:
    """Overlays of the newest step of the last stage that has any; of a group, those of its first run that has them."""
    notes: list[str] = []
    looked = [(group, media) for group in groups if (media := _newest_of(group))]
    shown = _columns([_selector(group) for group, _ in looked])
    found = [(f"{group.label} ({media.name})", _read(media, notes)) for group, media in (looked[i] for i in shown)]
    if len(looked) > MAX_COLUMNS:
        notes.append(f"shown are {MAX_COLUMNS} of {len(looked)} groups with overlays, each selector in one of them")
    names = list(dict.fromkeys(name for _, overlays in found for name in overlays))
    if len(names) > MAX_IMAGES:
        notes.append(f"shown are the first {MAX_IMAGES} of {len(names)} images")
    rows = {name: [overlays.get(name) for _, overlays in found] for name in names[:MAX_IMAGES]}
    return Gallery([label for label, _ in found], rows, notes) if rows else None


def answers(groups: Sequence[Group]) -> list[Answers]:
    """The first questions of each task that all groups with predictions were asked.

    Raises:
        UserError: a file of predictions is damaged.
    """
    tables = []
    shown = [groups[place] for place in _columns([_selector(group) for group in groups])]
    firsts = [(group.label, group.entries[0]) for group in shown]
    for task in figures.answered_tasks(entry for _, entry in firsts):
        asked = [(label, rows) for label, entry in firsts if (rows := _predictions(entry, task))]
        # By id, prompt and references: another world, or another prompt, may use the same ids.
        common = [name for name, row in (asked[0][1] if asked else {}).items()
                  if all(_question(rows.get(name)) == _question(row) for _, rows in asked)]  # fmt: skip
        lines = []
        for name in common[:QUESTIONS]:
            references = ", ".join(map(str, asked[0][1][name]["references"]))
            given = [(str(rows[name]["prediction"]), rows[name]["score"]) for _, rows in asked]
            lines.append((name, references, given))
        if lines:
            tables.append(Answers(task, [label for label, _ in asked], lines))
    return tables


def _columns(selectors: Sequence[str]) -> list[int]:
    """Which places are shown, in their order: the first of each selector, and as many others as there is room for."""
    firsts = {selector: place for place, selector in reversed(list(enumerate(selectors)))}
    order = sorted(range(len(selectors)), key=lambda place: place != firsts[selectors[place]])
    return sorted(order[:MAX_COLUMNS])


def _selector(group: Group) -> str:
    config = group.entries[0].last.config if group.entries[0].last else {}
    return str(config.get("model.selector._target_"))


def _newest_of(group: Group) -> Path | None:
    return next((path for entry in group.entries if (path := _newest(entry))), None)


def _newest(entry: Entry) -> Path | None:
    """answers.json is written last: a folder without it may lack overlays."""
    return next(
        (path.parent for stage in reversed(entry.stages)
         for path in sorted(stage.path.glob("media/step-*/answers.json"), reverse=True)), None,
    )  # fmt: skip


def _read(folder: Path, notes: list[str]) -> dict[str, Overlay]:
    """Sample's id -> overlay; a sample of several tiles has one for each."""
    try:
        looks = [
            (str(row["id"]), [Path(name).name for name in row["overlays"]], _caption(row))
            for row in json.loads((folder / "answers.json").read_text("utf-8"))
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(folder / "answers.json", f"{type(error).__name__}: {error}") from None
    overlays = {}
    for sample, names, caption in looks:
        for tile, name in enumerate(names):
            try:
                image = _embedded(folder / name)
            except UserError as error:
                notes.append(f"{error.what}: {error.found}")
            else:
                overlays[sample if len(names) == 1 else f"{sample}, tile {tile}"] = Overlay(image, caption)
    return overlays


def _caption(row: Mapping[str, Any]) -> dict[str, str]:
    question = row["question"].replace("<image>", "").strip()
    return {"question": question, "answer": row["answer"], "reference": " / ".join(row["references"])}


def _embedded(path: Path) -> str:
    """The overlay, no larger than the page needs it, as a data URI.

    Raises:
        UserError: no image, a damaged one, or one of more than MAX_PIXELS.
    """
    from anchorformer.images import open_image  # late: it brings torch

    image = open_image(path, max_pixels=MAX_PIXELS)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _question(row: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    return None if row is None else (row.get("prompt_sha256"), row["references"])


def _predictions(entry: Entry, task: str) -> dict[str, dict[str, Any]]:
    for stage in reversed(entry.stages):
        result = stage.results.get(task, {}).get(Condition.right)
        if result and "predictions" in result:
            # The name alone: a result that was edited must not make the report read another file.
            path = stage.path / "evals" / Path(result["predictions"]).name
            rows, _ = read_lines(path, PREDICTION) if path.is_file() else ([], False)
            return {str(row["id"]): row for row in rows}
    return {}
