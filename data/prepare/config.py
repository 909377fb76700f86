"""What `python -m data prepare NAME` can be told, and what a file of conf/prepare says of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import yaml
from pydantic import Field

from anchorformer.errors import UserError
from anchorformer.schema import Schema, parse
from data.annotations import RecordError, image_path
from data.overrides import CONF, check_option, options

GROUP = "prepare"

Gigabytes = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class FileConfig(Schema):
    """One published file: where it comes from (the first of `url`, `hub`, `manual` that is given) and where it goes."""

    to: str
    """Its place below `root`; of an archive, the folder that it is unpacked into."""
    gb: Gigabytes
    """Size in 10^9 bytes, roughly; said before anything is fetched."""
    url: str | None = None
    """Address: https://, or whatever fsspec opens."""
    hub: str | None = None
    """Data set on the Hugging Face hub, with `file` in it."""
    file: str | None = None
    """Name on the hub; of an archive that is fetched by hand, its name in <root>/.prepare/<data set>."""
    revision: str = "main"
    manual: str | None = None
    """Where a person fetches it, because the publisher wants a login."""
    sha256: str | None = None
    """As the publisher states it; of files on the hub it is asked for there."""
    unpack: bool = False
    """A zip or tar file, whose members are wanted."""
    unpacked_gb: Gigabytes = 0.0
    """What unpacking may write is at most twice as much."""
    only: tuple[str, ...] = ()
    """Patterns of the members that are wanted, as in a shell; all where there are none."""
    flat: bool = False
    """Members go straight into the folder, without the folders inside the archive."""
    holds: dict[str, Count] = field(default_factory=dict)
    """Folder below `root` -> files that it holds when this one is unpacked."""

    def __post_init__(self) -> None:
        needs_name = self.hub is not None or (self.manual is not None and self.unpack)
        if (needs_name and not self.file) or not (self.url or self.hub or self.manual):
            raise UserError(
                "a file of conf/prepare does not say where it comes from",
                found=f"url={self.url}, hub={self.hub}, file={self.file}, manual={self.manual}",
                expected="a url, hub and file, or manual (with an archive's file)", remedy="set one of them",
            )  # fmt: skip
        if self.unpack and not self.unpacked_gb:
            raise UserError(
                "an archive does not say how large it becomes", found=f"{self.to}: unpacked_gb=0",
                expected="10^9 bytes, roughly", remedy="set unpacked_gb",
            )  # fmt: skip
        for place in (self.to, *self.holds):
            try:
                image_path(place)
            except RecordError as error:
                raise UserError(
                    "a file of conf/prepare leaves the root",
                    found=error,
                    expected="a place below root",
                    remedy="correct it",
                ) from None


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Schema):
    """One published data set."""

    title: str
    page: str
    """Where people read about it, and where a license is agreed to."""
    licence: str
    """In one sentence; it informs and is no legal advice."""
    files: dict[str, FileConfig] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """Other names of conf/prepare that it is not complete without."""
    data: str | None = None
    """Name of conf/data that reads it."""
    tasks: tuple[str, ...] = ()
    """Names of conf/eval that read it."""
    records: dict[str, Count] = field(default_factory=dict)
    """Source of `data`, or task -> records as published."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Schema):
    """What is prepared, where, and how much is asked."""

    prepare: DatasetConfig
    root: str
    """The folder that training will know as data.root."""
    mirror: str | None = None
    """Folder or URL from which all files are taken in place of their publishers: <mirror>/<name>/<file>."""
    yes: bool = False
    """Do not ask on a terminal; elsewhere nothing is asked."""
    dry_run: bool = False
    """Only say what would be done."""
    keep_archives: bool = False
    """Leave archives in <root>/.prepare when they are unpacked."""
    cache_dir: str = ".cache/data"
    """Where the index goes: the data.cache_dir of the runs that will read it."""


def catalogue() -> list[str]:
    """The names of conf/prepare."""
    return options(GROUP)


def with_needs(name: str, chosen: DatasetConfig) -> Iterator[tuple[str, DatasetConfig]]:
    """What a data set needs, those first that others need, and itself last; each once.

    Args:
        chosen: `name` as the command line has it; the others are as their files have them.
    """
    seen: dict[str, DatasetConfig] = {}

    def walk(current: str, config: DatasetConfig) -> None:
        for other in config.needs:
            check_option(GROUP, other, catalogue(), "correct `needs`")
            if other not in seen:
                walk(other, named(other))
        seen.setdefault(current, config)

    walk(name, chosen)
    yield from seen.items()


def named(name: str) -> DatasetConfig:
    """A data set as its file describes it."""
    path = CONF / GROUP / f"{name}.yaml"
    return parse(DatasetConfig, yaml.safe_load(path.read_text()), str(path), "correct that file")
