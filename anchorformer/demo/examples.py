"""Images to begin with: a few from the data that a run was trained on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import yaml

from anchorformer.images import image_size

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
EXAMPLES, PER_FOLDER = 8, 2


def data_of(run: Path) -> Path | None:
    """The folder of a run's data, as its config.yaml names it from the folder that it was started in."""
    path = run / "config.yaml"
    if not path.is_file():
        return None
    config = yaml.safe_load(path.read_text("utf-8"))
    data = config.get("data") if isinstance(config, dict) else None
    root = data.get("root") if isinstance(data, dict) else None
    return Path(root) if isinstance(root, str) and Path(root).is_dir() else None


def examples(folder: Path) -> list[Path]:
    """The first images of each folder below this one."""
    return list(islice(_images(folder), EXAMPLES))


def _images(folder: Path) -> Iterator[Path]:
    for where, below, files in os.walk(folder):
        below.sort()
        found = (Path(where, name) for name in sorted(files) if name.lower().endswith(SUFFIXES))
        yield from islice((path for path in found if image_size(path) is not None), PER_FOLDER)
