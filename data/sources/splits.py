"""Which files of a folder belong to a split, told by the names that hub datasets are laid out with."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> words that stand for it in file and folder names, as Hugging Face `datasets` reads them."""

CANONICAL = {word: split for split, words in KEYWORDS.items() for word in words}

WORD = re.compile(rf"(?:^|(?<=[-._ 0-9]))({'|'.join(sorted(CANONICAL, key=len, reverse=True))})(?=[-._ 0-9]|$)")

SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")
"""How the hub writes a split of any name; other words may be part of such a name."""

SHOWN = 3
"""How many files an error names."""


def of_split(files: Sequence[Path], folder: Path, split: str) -> list[Path]:
    """The files below `folder` that belong to `split`; all of them where no name says anything about splits.

    Raises:
        ValueError: no file belongs to it, a name speaks of several splits, or some files' names speak of none.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    unnamed = []
    for file in files:
        splits = _splits_in(file.relative_to(folder).as_posix())
        if len(splits) > 1:
            raise ValueError(f"{file.relative_to(folder)} is named after several splits: {', '.join(sorted(splits))}")
        for name in splits:
            found[name].append(file)
        if not splits:
            unnamed.append(file)
    if not found:
        return list(files)
    listing = ", ".join(f"{name} ({len(found[name])} file(s))" for name in sorted(found))
    if unnamed:
        names = ", ".join(str(file.relative_to(folder)) for file in unnamed[:SHOWN])
        raise ValueError(f"splits {listing}, and {len(unnamed)} file(s) of no split: {names}")
    asked = CANONICAL.get(split, split)
    if asked not in found:
        raise ValueError(f"splits {listing} in {folder}")
    return found[asked]


def _splits_in(name: str) -> set[str]:
    shard = SHARD.fullmatch(name)
    if shard is not None:
        return {CANONICAL.get(shard[1], shard[1])}
    return {CANONICAL[word] for part in name.lower().split("/") for word in WORD.findall(part)}
