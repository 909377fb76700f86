"""`python -m train [VERB] overrides`: finds the verb's file and runs it; without a verb it is `run`."""

from __future__ import annotations

import ast
import difflib
import importlib
import logging
import sys
from pathlib import Path

from anchorformer.errors import UserError, run_guarded
from train.compose import COMMAND_LINE

VERBS = Path(__file__).parent / "verbs"
DEFAULT = "run"


def main(arguments: list[str]) -> int | None:
    """Runs the verb that the first argument names."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if {"-h", "--help"} & set(arguments):
        print(usage())
        return 0
    verb, rest = DEFAULT, arguments
    if arguments and "=" not in arguments[0] and arguments[0][:1].isalpha():
        verb, rest = arguments[0], arguments[1:]
    if verb not in verbs():
        near = difflib.get_close_matches(verb, verbs(), n=1)
        raise UserError(
            f"unknown verb '{verb}'", found=" ".join(arguments),
            expected=(f"'{near[0]}'? Verbs: " if near else "one of ") + ", ".join(verbs()),
            remedy="overrides are written key=value; python -m train --help",
        )  # fmt: skip
    from train.run.environment import discreet  # after the help, which needs nothing

    with discreet():
        code: int | None = importlib.import_module(f"train.verbs.{verb}").main(rest)
    return code


def verbs() -> list[str]:
    """The files of train/verbs/."""
    return sorted(path.stem for path in VERBS.glob("[a-z]*.py"))


def usage() -> str:
    """Verbs and config groups with their options, read from the folders they live in."""
    docs = {name: ast.get_docstring(ast.parse((VERBS / f"{name}.py").read_text())) or "" for name in verbs()}
    lines = ["usage: python -m train [VERB] [group=option ...] [key=value ...]", "", "verbs:"]
    lines += [f"  {name:12} {text.splitlines()[0]}" for name, text in docs.items()]
    groups = COMMAND_LINE.groups.items()
    lines += ["", "config groups:", *(f"  {name:12} {', '.join(options)}" for name, options in groups)]
    lines += ["", "keys: python -m train --cfg stage=align ... prints the composed config"]
    return "\n".join(lines)


if __name__ == "__main__":
    run_guarded(lambda: main(sys.argv[1:]))
