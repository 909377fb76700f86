"""What a start would do, as text: the composed config, the agent's command, the plan; it makes no file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import yaml

from anchorformer.errors import UserError
from anchorformer.schema import to_plain
from train.config import RunConfig
from train.plan.table import plan_stage, render
from train.verbs import plan as planning


def config_text(config: RunConfig) -> str:
    """The composed config as YAML."""
    return yaml.safe_dump(to_plain(config), sort_keys=False).rstrip()


def preview(config: RunConfig, argv: Sequence[str]) -> str:
    """The config as YAML, and behind `#` the command that this machine would run, and the plan.

    Args:
        argv: of the agent.
    """
    return "\n".join([config_text(config), f"# {shlex.join(argv)}", *(f"# {line}".rstrip() for line in _plan(config))])


def _plan(config: RunConfig) -> list[str]:
    """The plan's lines; the reason where the sizes of the model are not known yet, as of one that is still to be made.

    What does not fit is in the plan, and the remedies with it.
    """
    try:
        plan = plan_stage(config)
    except UserError as error:
        return [f"no plan: {error.what} ({error.found})"]
    _, assumed = planning.read([])
    remedies = [f"remedy: {'; or '.join(plan.remedies)}"] if plan.remedies else []
    return [*render(plan, assumed).splitlines(), *remedies]
