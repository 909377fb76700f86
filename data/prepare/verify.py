"""Proof that a data set lies where it is read: its sources open, counts agree, and every image is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import yaml
from tqdm import tqdm

from anchorformer.errors import UserError
from anchorformer.schema import parse, parse_plugin
from data.config import DataConfig
from data.overrides import CONF, CommandLine
from data.prepare.config import DatasetConfig
from data.record import Record
from data.shards.config import ShardConfig
from data.sources.base import PACKAGE, Source, SourceConfig

NAMED = 5
"""How many missing images an error names."""


def check_layout(config: DatasetConfig, root: Path, cache_dir: Path) -> Iterator[str]:
    """Opens what reads the data set, which writes its index, counts its records and looks for every image.

    Yields:
        A line per source that is sound.

    Raises:
        UserError: what opening a source raises, another number of records than was published, or missing images.
    """
    for name, source in _sources(config, root, cache_dir):
        expected = config.records.get(name)
        if expected is not None and len(source) != expected:
            raise UserError(
                f"{name} has another number of records than was published", found=len(source), expected=expected,
                remedy=f"the file may be cut or of another version: see {config.page}; prepare.records.{name}= "
                "where the new number is right",
            )  # fmt: skip
        images = _check_images(name, source)
        yield f"{name}: {len(source)} records, {images} images"


def holds(folders: dict[str, int], root: Path) -> str | None:
    """What is wrong with the number of files in some folders; None where nothing is."""
    for name, expected in folders.items():
        folder = root / name
        found = sum(entry.is_file() for entry in os.scandir(folder)) if folder.is_dir() else 0
        if found < expected:
            return f"{found} files in {folder}, {expected} were published"
    return None


def _sources(config: DatasetConfig, root: Path, cache_dir: Path) -> Iterator[tuple[str, Source]]:
    if config.data is not None:
        line = CommandLine(command="python -m data prepare", config="shard", schema=ShardConfig)
        words = [f"data={config.data}", "data.root=not-there-yet", "out=unused"]
        data = parse(DataConfig, line.compose(line.read(words))["data"], f"conf/data/{config.data}.yaml")
        for name, spec in sorted(data.sources.items()):
            yield name, parse_plugin(SourceConfig, spec, PACKAGE, name).open(name, root, cache_dir)
    for task in config.tasks:
        spec = yaml.safe_load((CONF / "eval" / f"{task}.yaml").read_text())["source"]
        yield task, parse_plugin(SourceConfig, spec, PACKAGE, task).open(task, root, cache_dir)


def _check_images(name: str, source: Source) -> int:
    """Every image that a record names is a file; returns how many there are."""
    seen: set[Path] = set()
    missing: list[Path] = []
    for index in tqdm(
        range(len(source)), desc=f"looking for images of {name}", unit=" records", delay=2, mininterval=0.5
    ):
        for ref in _record(source, index).images:
            if ref.path is not None and ref.path not in seen:
                seen.add(ref.path)
                if not ref.path.is_file():
                    missing.append(ref.path)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(seen)} images of {name} are not there",
            found=", ".join(map(str, missing[:NAMED])) + ", ..." * (len(missing) > NAMED), expected="every one of them",
            remedy="fetch what is missing; training leaves it out with data.on_bad_image=skip",
        )  # fmt: skip
    return len(seen)


def _record(source: Source, index: int) -> Record:
    try:
        return source[index]
    except UserError:  # training and scan say so; here it is about files
        return Record(id="", images=(), turns=())
