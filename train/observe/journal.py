"""How records of a run lie on disk: one JSON object per line, each with its step, taken back when the run is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from train.run.folder import write_atomically

MEDIA = "step-{:08d}"
"""Name of a step's folder below `RunFolder.media`."""


class Journal:
    """A file of records, appended to by rank 0 alone; on resume the lines after the checkpoint are taken back.

    Args:
        step: last step whose lines stay; 0 starts the file anew.
    """

    def __init__(self, path: Path, step: int) -> None:
        if path.is_file():
            kept = [line for line in read_lines(path) if json.loads(line)["step"] <= step] if step else []
            write_atomically(path, "".join(line + "\n" for line in kept))
        self._path = path
        self._file: IO[str] | None = None

    def write(self, record: dict[str, Any]) -> None:
        if self._file is None:  # what is switched off leaves no file
            self._file = self._path.open("a")
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Tail:
    """The complete lines that a journal has gained since they were last asked for.

    The file stays open: one that is replaced meanwhile, by a resumption of the run, gains no more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._rest = ""

    def take(self) -> Iterator[dict[str, Any]]:
        """Every new record; a line without its end is left for the next time."""
        if self._file is None and self._path.is_file():
            self._file = self._path.open()
        if self._file is None:
            return
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        yield from map(json.loads, lines)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_lines(path: Path) -> list[str]:
    """Complete lines of a journal; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def take_back_media(media: Path, step: int) -> None:
    """Removes the pictures of all later steps."""
    for folder in media.glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
