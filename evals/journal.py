"""Answers that survive a kill: each batch is on disk before the next one is asked, and no question is asked twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from anchorformer.errors import UserError
from data.record import ImageRef
from evals.questions import Question
from evals.tasks.base import Respondent

T = TypeVar("T")
ROUNDING = ("batch_size", "machine", "ranks", "vision_features")
"""Settings that change no answer in fp32; in bf16 the batch and who computes it decide how a number is rounded."""


class Journal:
    """What has been answered of one task under one condition, by position, in files that are only appended to.

    Each time that a process begins it writes a head: the settings that it answers with. A file of another model,
    prompt, image or decoding holds no answers here. Several processes write one file each.

    Args:
        stem: path of the files without their ending.
        writer: which of several processes this one is.
    """

    def __init__(self, stem: Path, settings: Mapping[str, Any], questions: Sequence[Question], writer: int = 0) -> None:
        self.settings = dict(settings)
        free = ROUNDING if settings.get("precision") == "fp32" else ()
        decisive = {name: value for name, value in settings.items() if name not in free}
        versions = {ref: _version(ref) for item in questions for ref in item.images}
        asked = [[item.id, item.turns, [versions[ref] for ref in item.images]] for item in questions]
        self._key = hashlib.sha256(json.dumps([decisive, asked], sort_keys=True, default=str).encode()).hexdigest()
        self._stem = stem
        self._path = _path(stem, writer)
        self.known: dict[int, Any] = {}
        for path in _files(stem):
            self.known |= {row["position"]: row["value"] for row in self._rows(path) if not _is_head(row)}

    def begin(self) -> None:
        """Makes this process' file, or goes on behind what is whole of the one that a killed process has left."""
        rows = [*self._rows(self._path), {"key": self._key, "settings": self.settings, "time": time.time()}]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Half a line at the end would swallow the one that is written behind it.
        beside = self._path.with_name(self._path.name + ".tmp")
        beside.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        beside.replace(self._path)

    def append(self, answers: Mapping[int, Any]) -> None:
        """Writes answers by position; call `begin` before the first ones."""
        rows = [{"position": position, "value": value, "time": time.time()} for position, value in answers.items()]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, rows)))
        self.known |= answers

    def spent(self, writers: int) -> tuple[float, int]:
        """Seconds from the last beginning of each of so many writers to its last answer, those of the slowest; and how
        many questions had been answered before."""
        seconds, before = 0.0, 0
        at_it = [_path(self._stem, writer) for writer in range(writers)]
        for path in _files(self._stem):
            rows = self._rows(path)
            heads = [place for place, row in enumerate(rows) if _is_head(row)]
            start = heads[-1] if heads and path in at_it else len(rows)
            before += sum(not _is_head(row) for row in rows[:start])
            if rows[start:]:
                seconds = max(seconds, rows[-1]["time"] - rows[start]["time"])
        return seconds, before

    def _rows(self, path: Path) -> list[dict[str, Any]]:
        """Those of a file, if it holds answers to these questions."""
        rows = _read(path)
        return rows if rows and rows[0]["key"] == self._key else []

    def remove(self) -> None:
        """Deletes the files of all writers; the result holds everything that is in them."""
        for path in _files(self._stem):
            path.unlink()


class Remembering:
    """A respondent that is only asked what its journal does not hold.

    Args:
        respondent: who answers; None where everything has to be there already.
        positions: of the questions that it will be asked, in the whole task.
        batch_size: questions between two writes.
    """

    def __init__(
        self, respondent: Respondent | None, journal: Journal, positions: Sequence[int], batch_size: int
    ) -> None:
        self._respondent, self._journal = respondent, journal
        self._positions, self._batch_size = positions, batch_size

    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """As the respondent's."""
        return self._all(questions, lambda asked, part: asked.answers(part, max_new_tokens), "answering")

    def answer_losses(self, questions: Sequence[Question]) -> list[tuple[float, int]]:
        """As the respondent's."""
        found = self._all(questions, lambda asked, part: asked.answer_losses(part), "reading")
        return [(loss, count) for loss, count in found]  # JSON has made lists of the pairs

    def _all(
        self, questions: Sequence[Question], ask: Callable[[Respondent, Sequence[Question]], list[T]], verb: str
    ) -> list[T]:
        journal, respondent = self._journal, self._respondent
        missing = [place for place, position in enumerate(self._positions) if position not in journal.known]
        if missing and respondent is None:
            raise UserError(
                "questions were left without an answer", found=f"{len(missing)} of {len(questions)}",
                expected="an answer to each from the processes that were started", remedy="run the command again",
            )  # fmt: skip
        if missing and respondent is not None:
            done = len(questions) - len(missing)
            with tqdm(total=len(questions), initial=done, desc=verb, unit=" questions", delay=2, leave=False) as bar:
                for start in range(0, len(missing), self._batch_size):
                    places = missing[start : start + self._batch_size]
                    values = ask(respondent, [questions[place] for place in places])
                    journal.append({self._positions[n]: value for n, value in zip(places, values, strict=True)})
                    bar.update(len(places))
        return [journal.known[position] for position in self._positions]


def last_settings(stem: Path) -> dict[str, Any]:
    """Those that the first writer last began with; empty where it has not."""
    heads = [row for row in _read(_path(stem, 0)) if _is_head(row)]
    return dict(heads[-1]["settings"]) if heads else {}


def _version(ref: ImageRef) -> Any:
    """Which image it is just now: of a file size and time, so that one that was replaced is another one."""
    if ref.data is not None:
        return hashlib.sha256(ref.data).hexdigest()
    if ref.stored is None and ref.path is not None and ref.path.is_file():
        status = ref.path.stat()
        return [status.st_size, status.st_mtime_ns]
    return str(ref.path)  # in a shard, which never changes; or missing, as asking will say


def _is_head(row: Mapping[str, Any]) -> bool:
    return "key" in row


def _path(stem: Path, writer: int) -> Path:
    return stem.with_name(f"{stem.name}.partial-{writer}.jsonl")


def _files(stem: Path) -> list[Path]:
    return sorted(stem.parent.glob(f"{stem.name}.partial-*.jsonl"))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; what a kill has cut off counts as not written."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]
