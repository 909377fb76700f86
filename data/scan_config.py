"""What `python -m data scan` can be told; imports no torch, so that a mistake is answered at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from anchorformer.schema import Schema
from data.config import DataConfig, OnBad

TemplateName = Literal["plain", "v1", "chat"]
"""Conversation templates, as `anchorformer.templates.make_template` knows them."""


@dataclass(frozen=True, kw_only=True)
class ScanConfig(Schema):
    """What is scanned, with which processor, and how much may be wrong."""

    data: DataConfig
    processor: str
    """Run folder (its `model/` is taken), model folder, or a tokenizer's folder (then `num_image_tokens` and
    `template` are needed)."""
    template: TemplateName | None = None
    """Conversation template; null is the processor's own."""
    num_image_tokens: int | None = None
    """Embeddings per image, where the folder does not say; the connector's T."""
    max_bad_share: float = 0.0
    """Share of unusable records above which the command exits with 1."""
    show: int = 3
    """Samples printed with their supervised text in colour."""
    threads: int = 0
    """Images decoded at once; 0 is one per CPU."""
    out: str | None = None
    """File for every finding, one JSON object per line."""

    @property
    def whole(self) -> DataConfig:
        """The data with every record in them, whatever training would say of it: a scan lists them all."""
        return replace(self.data, on_bad_record=OnBad.skip)
