"""The same images and questions across what is compared: overlays of the anchors, answers beside references."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from evals.config import Condition
from evals.report import figures
from evals.report.files import read_lines, unreadable
from evals.report.gathering import Entry
from evals.report.reading import Stage
from evals.report.seeds import Group

MAX_IMAGES, MAX_COLUMNS = 8, 8
"""Images and groups that are shown at most; a page has to open."""
MAX_SIDE = 384
"""Pixels of an overlay's longer side on the page."""
MAX_PIXELS = 2**24
"""Largest overlay that is opened."""
QUESTIONS = 6
"""Questions of each task whose answers are shown."""


@dataclass(frozen=True)
class Overlay:
    """One image as one model saw it.

    Attributes:
        image: PNG as a data URI.
        caption: label -> text: question, answer, reference, as far as they were written.
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
    found: list[tuple[str, dict[str, Overlay]]] = []
    for group in groups:
        media = next((path for entry in group.entries if (path := _newest(entry))), None)
        if media:
            step = int(media.name.removeprefix("step-"))
            found.append((f"{group.label} · step {step}", _read(media, notes)))
    if len(found) > MAX_COLUMNS:
        notes.append(f"shown are the first {MAX_COLUMNS} of {len(found)} groups with overlays")
    found = found[:MAX_COLUMNS]
    names = sorted({name for _, overlays in found for name in overlays})
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
    firsts = [(group.label, group.entries[0]) for group in groups][:MAX_COLUMNS]
    for task in figures.answered_tasks(entry for _, entry in firsts):
        asked = [(label, rows) for label, entry in firsts if (rows := _predictions(entry, task))]
        common = [name for name in (asked[0][1] if asked else ()) if all(name in rows for _, rows in asked)]
        lines = []
        for name in common[:QUESTIONS]:
            references = ", ".join(map(str, asked[0][1][name]["references"]))
            given = [(str(rows[name]["prediction"]), rows[name]["score"]) for _, rows in asked]
            lines.append((name, references, given))
        if lines:
            tables.append(Answers(task, [label for label, _ in asked], lines))
    return tables


def _newest(entry: Entry) -> Path | None:
    folders = [path for stage in reversed(entry.stages) for path in sorted(_media(stage), reverse=True)]
    return next((path for path in folders if any(path.glob("*.png"))), None)


def _media(stage: Stage) -> Iterable[Path]:
    return (path for path in stage.path.glob("media/step-*") if path.name.removeprefix("step-").isdecimal())


def _read(folder: Path, notes: list[str]) -> dict[str, Overlay]:
    captions = _captions(folder / "answers.json")
    overlays = {}
    for path in sorted(folder.glob("*.png")):
        try:
            image = _embedded(path)
        except UserError as error:
            notes.append(f"{error.what}: {error.found}")
        else:
            overlays[path.stem] = Overlay(image, captions.get(path.stem, {}))
    return overlays


def _captions(path: Path) -> dict[str, dict[str, str]]:
    """answers.json by the stem of the overlay: a list of objects of which one value names the file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
        rows = content if isinstance(content, list) else list(content.values())
        return {
            Path(str(row["overlay"])).stem: {
                key: _text(row[key]) for key in ("question", "answer", "reference", "references") if key in row
            }
            for row in rows
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(path, f"{type(error).__name__}: {error}") from None


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


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


def _predictions(entry: Entry, task: str) -> dict[str, dict[str, Any]]:
    for stage in reversed(entry.stages):
        result = stage.results.get(task, {}).get(Condition.right)
        if result and "predictions" in result:
            # The name alone: a result that was edited must not make the report read another file.
            path = stage.path / "evals" / Path(result["predictions"]).name
            rows, _ = read_lines(path) if path.is_file() else ([], False)
            return {str(row["id"]): row for row in rows}
    return {}
