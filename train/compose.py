"""From the command line of a run to its checked RunConfig; imports no torch."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from anchorformer.schema import parse
from data.overrides import CONF, CommandLine
from train.config import RunConfig

ROOT = CONF.parent

COMMAND_LINE = CommandLine(
    command="python -m train", config="config", schema=RunConfig, plugins=("model.selector", "model.connector"),
    remedies={
        "vision": "a hub id or a folder of your own is model.vision=...",
        "llm": "a hub id or a folder of your own is model.language_model=...",
    },
)  # fmt: skip


def compose(overrides: Sequence[str], stand_ins: Mapping[str, Any] | None = None) -> RunConfig:
    """Composes conf/ with the overrides and parses the result; a run without a name is named after stage and time.

    Args:
        overrides: as on the command line: `group=option`, `key.path=value`, `+group...` as Hydra writes them.
        stand_ins: key -> its value where neither YAML nor override gives one.

    Raises:
        UserError: what `CommandLine` raises, a value of the wrong type, or values that contradict each other.
    """
    composed = COMMAND_LINE.compose(COMMAND_LINE.read(overrides), stand_ins=stand_ins)
    if composed["run"] is None:
        composed["run"] = f"{composed['stage']['name']}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return parse(RunConfig, composed, "config")
