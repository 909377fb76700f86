"""`python -m evals.harness task=... data.root=... out=...`: writes local tasks for lmms-eval."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anchorformer.errors import run_guarded
from anchorformer.schema import parse
from data.overrides import CommandLine, options
from data.usage import HELP, defaults, listed
from evals.__main__ import chosen
from evals.config import QuestionsConfig
from evals.harness.writing import write_task
from evals.prepare import prepare


@dataclass(frozen=True, kw_only=True)
class HarnessConfig(QuestionsConfig):
    """Which questions are written where."""

    out: str
    """Folder of the task files, for lmms-eval's --include_path."""


COMMAND_LINE = CommandLine(command="python -m evals.harness", config="harness", schema=HarnessConfig, keys=("task",))


def compose_config(overrides: Sequence[str]) -> HarnessConfig:
    """The command line as a checked config.

    Raises:
        UserError: what `CommandLine` raises, an unknown task, or a value of the wrong type.
    """
    parsed = COMMAND_LINE.read(overrides)
    composed = COMMAND_LINE.compose(parsed, [f"+eval@tasks.{name}={name}" for name in chosen(parsed)])
    del composed["task"]
    return parse(HarnessConfig, composed, COMMAND_LINE.command, COMMAND_LINE.remedy)


def usage() -> str:
    """How the command is written, with the tasks and keys that there are."""
    return f"""usage: python -m evals.harness task=<task> data.root=<folder> out=<folder> [key=value ...]
       several tasks: "task=[docvqa_val,chartqa_test]"; a value of one: tasks.<task>.source.prompt_suffix=...

Writes the questions of tasks as lmms-eval reads local ones: <task>.jsonl and <task>.yaml, to be named with
`python -m lmms_eval --model anchorformer --include_path <out> --tasks local_<task>` (docs/harness.md).

{listed("tasks:", options("eval"), ",")}
{listed("keys:", defaults(HarnessConfig))}"""


def main() -> int:
    if len(sys.argv) == 1 or not set(HELP).isdisjoint(sys.argv):
        print(usage())
        return 0
    config = compose_config(sys.argv[1:])
    out = Path(config.out)
    for name, (task, questions) in prepare(config).items():
        print(f"{write_task(name, task, questions, out)}: {len(questions)} questions in {out / name}.jsonl")
    return 0


if __name__ == "__main__":
    run_guarded(main)
