"""Which data a run reads and how it treats the awkward samples; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

from pydantic import Field

from anchorformer.schema import Schema

# Strict, or `true` would be a 1.
Count = Annotated[int, Field(ge=1, strict=True)]
NotNegative = Annotated[int, Field(ge=0, strict=True)]
Share = Annotated[float, Field(ge=0, le=1)]


class Overlength(str, Enum):
    error = "error"
    drop = "drop"
    truncate_answer = "truncate_answer"


class OnBad(str, Enum):
    error = "error"
    skip = "skip"


@dataclass(frozen=True, kw_only=True)
class DataConfig(Schema):
    """Where samples come from and what happens to the awkward ones."""

    root: str
    """Folder that relative paths of the sources start from."""
    shards: str | None = None
    """Sharded copy of these sources (`python -m data prepare shard`) that is read in their place: a folder or an fsspec
    URL, in which no key may stand; null reads the published files."""
    sources: dict[str, dict[str, Any]]
    """Name -> plug-in of `data.sources`, each with a `weight` (passes over it per epoch)."""
    max_length: Count = 2048
    """Positions per sample, anchors counted."""
    overlength: Overlength = Overlength.error
    """A longer sample is an error, is left out and counted, or loses the end of its answer (never an anchor)."""
    on_bad_image: OnBad = OnBad.error
    """A missing or unreadable image is an error, or its sample is left out of its step and counted."""
    on_bad_record: OnBad = OnBad.error
    """A record that cannot be used (`data.verdicts`) is an error, or is left out of the mixture and counted."""
    max_dropped_share: Share = 0.02
    """Share of dropped or skipped samples above which the run stops."""
    token_budget: Count | None = None
    """Most positions in one micro-batch; null leaves it to the plan where the run names its card (`train.plan`), and
    to `hardware.micro_batch` alone where it does not."""
    num_workers: NotNegative = 0
    """Loader processes per rank."""
    cache_dir: str = ".cache/data"
    """Where Arrow copies of the annotations and token counts are kept."""
    feature_cache: str | None = None
    """Folder of vision features that are computed once for all runs (`data.features`); null runs the tower live, which
    a selector that gives images different numbers of anchors does not allow."""
