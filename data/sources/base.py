"""What every source is: a config that names files, and memory-mapped records behind `len` and an index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field

from anchorformer.schema import Schema
from data.record import Record

PACKAGE = "data.sources"


class Source(Protocol):
    """Records of one dataset, by position; opening one reads no more than that one from disk."""

    name: str
    fingerprint: str
    """Hash of the annotation files and of the options that decide which records there are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record.

        Raises:
            UserError: it cannot be understood; names its file and place.
        """
        ...

    def check_records(self) -> None:
        """Refuses a source some of whose records are known, without reading one, not to be understood.

        Raises:
            UserError: what `self[index]` raises for the first of them, and how many there are.
        """
        ...

    def record_id(self, index: int) -> str:
        """The id of that record, without reading the rest."""
        ...


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Schema):
    """Base of all source configs; a new dataset subclasses it beside its reader and adds one YAML."""

    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Passes over this source per epoch of the mixture; 0 leaves it out."""

    def open(self, name: str, root: Path, cache_dir: Path) -> Source:
        """Reads the annotations (once; an Arrow copy is kept in `cache_dir`).

        Raises:
            UserError: file or folder missing, or not in the expected layout.
        """
        raise NotImplementedError
