"""From the command line of a run to its checked RunConfig; imports no torch."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from anchorformer.schema import parse
from data.overrides import CONF, CommandLine, check_option, options, values
from train.choices import Part
from train.config import RunConfig

ROOT = CONF.parent
TASKS = "eval.tasks"
"""The key whose values are names of conf/eval on the command line."""

COMMAND_LINE = CommandLine(
    command="python -m train", config="config", schema=RunConfig,
    plugins=("model.selector", "model.connector", "model.integration", "tracker"),
    remedies={
        "vision": "a hub id or a folder of your own is model.vision=...",
        "llm": "a hub id or a folder of your own is model.language_model=...",
    },
)  # fmt: skip


def compose(overrides: Sequence[str], stand_ins: Mapping[str, Any] | None = None) -> RunConfig:
    """Composes conf/ with the overrides and parses the result; a run without a name is named after stage and time.

    An integration is trained as the connector is where `stage.trains.integration` says nothing else.

    Args:
        overrides: as on the command line: `group=option`, `key.path=value`, `+group...` as Hydra writes them; and
            `eval.tasks=[name,...]`, whose names are files of conf/eval.
        stand_ins: key -> its value where neither YAML nor override gives one.

    Raises:
        UserError: what `CommandLine` raises, an unknown task, a value of the wrong type, or values that contradict each
            other.
    """
    parsed = COMMAND_LINE.read(overrides)
    named = [item for item in parsed if item.key_or_group == TASKS]
    names = values(named[-1]) if named else []
    for name in names:
        check_option(TASKS, name, options("eval"), "name a file of conf/eval; a task of your own is one YAML there")
    composed = COMMAND_LINE.compose(
        [item for item in parsed if item not in named], [f"+eval@{TASKS}.{name}={name}" for name in names], stand_ins
    )
    if named:  # instead of those that an experiment names, not beside them
        composed["eval"]["tasks"] = {name: composed["eval"]["tasks"][name] for name in names}
    trains = composed["stage"]["trains"]
    if composed["model"].get("integration") is not None and Part.connector.value in trains:
        # What an integration adds is as new as the connector, and trained with it.
        trains.setdefault(Part.integration.value, dict(trains[Part.connector.value]))
    if composed["run"] is None:
        composed["run"] = f"{composed['stage']['name']}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return parse(RunConfig, composed, "config")
