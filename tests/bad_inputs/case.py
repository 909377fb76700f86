"""What one planted bad input is, and what all of them are planted in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorformer.processing import AnchorFormerProcessor


@dataclass(frozen=True)
class World:
    """Sound inputs to spoil copies of.

    Attributes:
        folder: this case's own.
        model, backbones: a model folder, and the folder with `clip` and `llama` that it was assembled from.
        run: a run of stage align with one checkpoint.
        processor: the model's.
    """

    folder: Path
    model: Path
    backbones: Path
    run: Path
    processor: AnchorFormerProcessor

    def copy(self, source: Path) -> Path:
        """A copy of a folder, in this case's own."""
        return Path(shutil.copytree(source, self.folder / source.name))

    def write(self, name: str, content: Any) -> Path:
        """A file in this case's folder: bytes, text, or what JSON makes of anything else."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        plant: makes it, and lets the program meet it.
        says: what the message has to name; nothing where the input is unusual and accepted.
    """

    name: str
    plant: Callable[[World], object]
    says: tuple[str, ...] = ()


def change_json(path: Path, **values: Any) -> None:
    """Sets keys of a JSON object on disk; `...` removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
