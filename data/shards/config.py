"""What `python -m data prepare shard` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from anchorformer.errors import UserError
from anchorformer.schema import Schema
from data.config import Count, DataConfig, NotNegative


@dataclass(frozen=True, kw_only=True)
class ShardConfig(Schema):
    """What is copied, and how the copy is cut."""

    data: DataConfig
    out: str
    """Folder of the copy."""
    shard_mb: Count = 512
    """Million bytes of images in one shard; one image alone may be larger."""
    threads: NotNegative = 0
    """Images read at once; 0 is four per CPU, because most of their time is waiting."""
    verify: bool = False
    """Read a finished copy again and compare every sha256 of its manifest."""

    def __post_init__(self) -> None:
        if self.data.shards is not None:
            raise UserError(
                "a sharded copy is made of the published files", found=f"data.shards={self.data.shards}",
                expected="data.shards=null", remedy="leave data.shards out",
            )  # fmt: skip
