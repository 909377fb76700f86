"""`python -m evals model=... task=...`: composes an evaluation with Hydra, checks it, runs it, prints the scores."""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from anchorformer.errors import UserError, run_guarded
from anchorformer.schema import parse
from data.folders import model_folder
from data.overrides import CONF, CommandLine, Override, check_option, options, values
from data.usage import HELP, defaults, listed
from evals.config import Condition, EvalConfig
from evals.prepare import prepare
from evals.workers import run_shares

COMMAND_LINE = CommandLine(
    command="python -m evals", config="evals", schema=EvalConfig, keys=("task", "selector"),
    plugins=("selector", "decoding"),
)  # fmt: skip


def compose_config(overrides: Sequence[str]) -> EvalConfig:
    """The command line as a checked config: the tasks it names are taken from conf/eval.

    Raises:
        UserError: what `CommandLine` raises, an unknown task or selector, or a value of the wrong type.
    """
    parsed = COMMAND_LINE.read([word for override in overrides for word in _in_full(override)])
    groups = [f"+eval@tasks.{name}={name}" for name in chosen(parsed)]
    groups += [f"+selector@selector={name}" for name in _other_selector(parsed)]
    composed = COMMAND_LINE.compose([item for item in parsed if item.key_or_group != "selector"], groups)
    del composed["task"]
    if isinstance(composed["conditions"], str):  # one may be named without brackets, as one task may
        composed["conditions"] = [composed["conditions"]]
    return parse(EvalConfig, composed, COMMAND_LINE.command, COMMAND_LINE.remedy)


def usage() -> str:
    """How the command is written, with the tasks, conditions and keys that there are."""
    tasks = "\n".join(_about(name) for name in options("eval"))
    return f"""usage: python -m evals model=<run or model folder> task=<task> data.root=<folder> [key=value ...]
       several tasks or conditions: "task=[a,b]" "conditions=[{",".join(Condition)}]"
       a value of one task: tasks.<task>.max_new_tokens=64
       python -m evals model=... task=custom data=mine.jsonl "metrics=[exact,anls,relaxed]"

Answers and scores questions; predictions and results go to <model>/evals, one of each per task and condition.
selector= (with selector.num_anchors= and the like) puts another selector before the trained connector, decoding=damro
decodes otherwise (experimental); such results go to a folder of their own there.

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
    from evals.respondent import load, num_cards
    from evals.runner import evaluate, line, put_together

    out = out_folder(config)
    if config.ranks > 1:
        run_shares(sys.argv[1:], config.ranks, num_cards(config.device))
        found = put_together(config, prepared, out)
    else:
        respondent = load(folder, config, [question for _, questions in prepared.values() for question in questions])
        found = evaluate(config, prepared, respondent, respondent.facts, out, respondent.peak_gib)
    for result in found:
        print(line(result), flush=True)
    print(f"predictions and results: {out}")
    return 0


def out_folder(config: EvalConfig) -> Path:
    """Where predictions and results go."""
    return Path(config.out) if config.out else Path(config.model) / "evals" / (config.variant_name or "")


def _in_full(override: str) -> list[str]:
    """What the two short words stand for that questions of one's own are asked with (`task=custom`)."""
    key, _, value = override.partition("=")
    if key == "data":
        file = Path(value.strip("'\""))
        return [f"data.root={_quoted(str(file.parent))}", f"tasks.custom.source.annotations={_quoted(file.name)}"]
    if key == "metrics":
        first, *further = value.strip("[]").split(",")
        return [f"tasks.custom.metric={first.strip()}", f"tasks.custom.further=[{','.join(further)}]"]
    return [override]


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def chosen(overrides: Sequence[Override]) -> list[str]:
    """The tasks that `task=` names.

    Raises:
        UserError: one that conf/eval does not have.
    """
    given = [item for item in overrides if item.key_or_group == "task"]
    names = values(given[-1]) if given else []
    for name in names:
        check_option("task", name, options("eval"), "name a file of conf/eval; a task of your own is one YAML there")
    return names


def _other_selector(overrides: Sequence[Override]) -> list[str]:
    """The selector that `selector=` names, if there is one.

    Raises:
        UserError: one that conf/selector does not have, or values of a selector without its name.
    """
    # Those that are another one at another size stand on a group of the run's config, which is not here.
    whole = [name for name in options("selector") if "defaults" not in (CONF / "selector" / f"{name}.yaml").read_text()]
    given = [name for item in overrides if item.key_or_group == "selector" for name in values(item)][-1:]
    if not given and any(item.key_or_group.startswith("selector.") for item in overrides):
        raise UserError(
            "selector.* without selector=", found="values of a selector that is not named",
            expected=f"selector= with one of {', '.join(whole)}", remedy="name the selector as well",
        )  # fmt: skip
    for name in given:
        check_option("selector", name, whole, "name a file of conf/selector")
    return given


def _about(task: str) -> str:
    lines = (CONF / "eval" / f"{task}.yaml").read_text("utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return textwrap.fill(comment or "-", 110, initial_indent=f"  {task:18}", subsequent_indent=" " * 20)


if __name__ == "__main__":
    run_guarded(main)
