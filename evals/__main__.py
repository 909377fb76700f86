"""`python -m evals model=... task=...`: composes an evaluation with Hydra, checks it, runs it, prints the scores."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from anchorformer.errors import run_guarded
from anchorformer.schema import parse
from data.folders import model_folder
from data.overrides import CONF, HELP, Override, check_keys, check_option, compose, defaults, listed, options, read
from evals.config import Condition, EvalConfig
from evals.prepare import prepare

REMEDY = "correct the override; `python -m evals --help` lists the tasks and keys"


def compose_config(overrides: Sequence[str]) -> EvalConfig:
    """The command line as a checked config: the tasks it names are taken from conf/eval.

    Raises:
        UserError: an override that cannot be read, an unknown key or task, a value that is missing or of a wrong type.
    """
    parsed = read(overrides, REMEDY)
    check_keys(parsed, EvalConfig, ["task"], REMEDY)
    tasks = [f"+eval@tasks.{name}={name}" for name in _chosen(parsed)]
    composed = compose("evals", parsed, (), tasks)
    del composed["task"]
    if isinstance(composed["conditions"], str):  # one may be named without brackets, as one task may
        composed["conditions"] = [composed["conditions"]]
    return parse(EvalConfig, composed, "python -m evals", REMEDY)


def usage() -> str:
    """How the command is written, with the tasks, conditions and keys that there are."""
    tasks = "\n".join(_about(name) for name in options("eval"))
    return f"""usage: python -m evals model=<run or model folder> task=<task> data.root=<folder> [key=value ...]
       several tasks or conditions: "task=[a,b]" "conditions=[{",".join(Condition)}]"
       a value of one task: tasks.<task>.max_new_tokens=64

Answers and scores questions; predictions and results go to <model>/evals, one of each per task and condition.

tasks:
{tasks}

{listed("keys:", defaults(EvalConfig))}"""


def main() -> int:
    if len(sys.argv) == 1 or not set(HELP).isdisjoint(sys.argv):
        print(usage())
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = compose_config(sys.argv[1:])
    folder = model_folder(config.model, "model", "config.json")
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
    names = [str(name) for name in (names if isinstance(names, list) else [names])]
    for name in names:
        check_option("task", name, options("eval"), "name a file of conf/eval; a task of your own is one YAML there")
    return names


def _about(task: str) -> str:
    lines = (CONF / "eval" / f"{task}.yaml").read_text("utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return textwrap.fill(comment or "-", 110, initial_indent=f"  {task:18}", subsequent_indent=" " * 20)


if __name__ == "__main__":
    run_guarded(main)
