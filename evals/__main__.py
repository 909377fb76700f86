"""`python -m evals model=... task=...`: composes an evaluation with Hydra, checks it, runs it, prints the scores."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anchorformer.errors import UserError, run_guarded
from anchorformer.schema import parse
from evals.config import EvalConfig
from evals.prepare import model_folder, prepare

CONF = Path(__file__).resolve().parent.parent / "conf"


def compose_config(overrides: Sequence[str]) -> EvalConfig:
    """The command line as a checked config: the tasks it names are taken from conf/eval.

    Raises:
        UserError: an override that cannot be read, an unknown key or task, a value that is missing or of a wrong type.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        tasks = [f"+eval@tasks.{name}={name}" for name in _chosen(parsed)]
        # Added by force, so that unknown keys are refused by `parse`, which names the nearest one.
        values = ["++" + str(item.input_line).lstrip("+") for item in parsed]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = OmegaConf.to_container(compose("evals", overrides=[*tasks, *values]), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            "the command line cannot be read",
            found=str(error).splitlines()[0],
            expected="key=value ..., with keys of conf/evals.yaml",
            remedy="quote values with blanks or brackets for the shell; tasks.<name>.<key>=<value> sets a task's value",
        ) from None
    assert isinstance(composed, dict)
    unknown = composed.keys() - {field.name for field in dataclasses.fields(EvalConfig)} - {"task"}
    missing = sorted(_missing(composed))
    if missing and not unknown:  # a misspelt key leaves its right name missing; `parse` says so better
        raise UserError(
            f"{len(missing)} value(s) are missing",
            found=", ".join(f"{key}=???" for key in missing),
            expected="a value for each of them",
            remedy="add " + " ".join(f"{key}=..." for key in missing),
        )
    return parse(EvalConfig, {str(key): item for key, item in composed.items() if key != "task"}, "python -m evals")


def task_names() -> list[str]:
    """The tasks there are: one file each in conf/eval."""
    return sorted(path.stem for path in (CONF / "eval").glob("*.yaml"))


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = compose_config(sys.argv[1:])
    folder = model_folder(config.model)
    prepared = prepare(config)
    # Only now: everything above answers within a second, because none of it needs torch.
    from evals.respondent import load
    from evals.runner import evaluate, line

    respondent = load(folder, config)
    out = Path(config.out) if config.out else Path(config.model) / "evals"
    for result in evaluate(config, prepared, respondent, respondent.facts, out):
        print(line(result), flush=True)
    print(f"predictions and results: {out}")
    return 0


def _chosen(overrides: Sequence[Override]) -> list[str]:
    values = [item.value() for item in overrides if item.key_or_group == "task"]
    names = values[-1] if values else []
    for name in names if isinstance(names, list) else [names]:
        if name not in task_names():
            near = difflib.get_close_matches(str(name), task_names(), n=1)
            raise UserError(
                f"there is no task '{name}'",
                found=f"task={name}",
                expected=f"'{near[0]}'?" if near else f"one of {', '.join(task_names())}",
                remedy="name a file of conf/eval; a task of your own is one YAML there",
            )
    return names if isinstance(names, list) else [names]


def _missing(values: Mapping[Any, Any], parent: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _missing(value, f"{parent}{key}.")
        elif value == "???":
            yield f"{parent}{key}"


if __name__ == "__main__":
    run_guarded(main)
