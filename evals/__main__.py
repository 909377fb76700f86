"""`python -m evals model=... task=...`: composes an evaluation with Hydra, checks it, runs it, prints the scores."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anchorformer.errors import UserError, run_guarded
from anchorformer.schema import parse
from evals.config import EvalConfig
from evals.runner import evaluate, line, prepare

CONF = Path(__file__).resolve().parent.parent / "conf"


def compose_config(overrides: Sequence[str]) -> EvalConfig:
    """The command line as a checked config: the tasks it names are taken from conf/eval.

    Raises:
        UserError: an override that cannot be read, an unknown key or task, a value that is missing or of a wrong type.
    """
    try:
        names = _task_names(overrides)
        groups = [f"+eval@tasks.{name}={name}" for name in names]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("evals", overrides=[*overrides, *groups])
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(
            "the evaluation is not complete",
            found=str(error).splitlines()[0],
            expected="model=..., task=... and data.root=...",
            remedy="python -m evals model=checkpoints/<run> task=docvqa_val data.root=<folder>",
        ) from None
    except (HydraException, OmegaConfBaseException, OSError) as error:
        raise UserError(
            "the command line does not fit conf/evals.yaml",
            found=str(error).splitlines()[0],
            expected=f"keys of conf/evals.yaml; tasks: {', '.join(task_names())}",
            remedy="correct the spelling; values of a task are set as tasks.<name>.<key>=<value>",
        ) from None
    assert isinstance(values, dict)
    del values["task"]
    return parse(EvalConfig, {str(key): value for key, value in values.items()}, "python -m evals")


def task_names() -> list[str]:
    """The tasks there are: one file each in conf/eval."""
    return sorted(path.stem for path in (CONF / "eval").glob("*.yaml"))


def model_folder(name: str) -> Path:
    """The model folder of a run, or the folder itself where it is one.

    Raises:
        UserError: there is no model in it.
    """
    folder = Path(name)
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file():
            return candidate
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
    raise UserError(
        f"no model in {name}",
        found=there,
        expected="a finished run (with model/ in it) or a model folder (with config.json)",
        remedy="finish the run, or pass the folder that `python -m anchorformer.assemble` wrote",
    )


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = compose_config(sys.argv[1:])
    folder = model_folder(config.model)
    prepared = prepare(config)
    # Only now: everything above answers within a second, and none of it needs torch.
    from evals.respondent import load

    respondent, facts = load(folder, config)
    out = Path(config.out) if config.out else Path(config.model) / "evals"
    for result in evaluate(config, prepared, respondent, facts, out):
        print(line(result))
    print(f"predictions and results: {out}")


def _task_names(overrides: Sequence[str]) -> list[str]:
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [item.value() for item in parsed if item.key_or_group == "task"]
    names = values[-1] if values else []
    return [str(name) for name in (names if isinstance(names, list) else [names])]


if __name__ == "__main__":
    run_guarded(main)
