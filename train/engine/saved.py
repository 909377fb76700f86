"""What `engine.json` of a checkpoint says about the engine's files beside it; imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

FILE = "engine.json"


class Form(str, Enum):
    whole = "whole"
    """Whole tensors by name: readable on any number of ranks, under any ZeRO stage."""
    shards = "shards"
    """DeepSpeed's file per rank: readable on as many ranks under the same stage, or after conversion."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """How an engine's state was written.

    Attributes:
        ranks, zero_stage: of the engine that wrote it.
        optimizer_steps: steps that the optimizer has counted.
        scheduler: state of the learning rate's course.
    """

    form: Form
    ranks: int
    zero_stage: int
    optimizer_steps: int
    scheduler: dict[str, Any]

    def write(self, folder: Path) -> Path:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")
        return folder / FILE

    @classmethod
    def read(cls, folder: Path) -> Saved:
        raw = json.loads((folder / FILE).read_text())
        return cls(**{**raw, "form": Form(raw["form"])})

    def fits(self, ranks: int, zero_stage: int) -> bool:
        """Whether an engine of so many ranks under that stage reads the files as they are."""
        return self.form is Form.whole or (self.ranks, self.zero_stage) == (ranks, zero_stage)
