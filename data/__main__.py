"""`python -m data VERB ...`: finds the verb's file and runs it."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from anchorformer.errors import UserError, run_guarded
from data.usage import HELP

VERBS = Path(__file__).parent / "verbs"


def main(arguments: Sequence[str]) -> int:
    """Runs the verb that the first argument names, or shows how it is written.

    Raises:
        UserError: unknown verb, and what the verb raises.
    """
    asks = not set(HELP).isdisjoint(arguments)
    words = [word for word in arguments if word not in HELP]
    if not words:
        print(usage())
        return 0
    verb, *rest = words
    if verb not in verbs():
        if asks:
            print(usage())
            return 0
        print(usage(), file=sys.stderr)
        near = difflib.get_close_matches(verb, verbs(), n=1)
        raise UserError(
            f"unknown verb '{verb}'",
            found=" ".join(arguments),
            expected=f"'{near[0]}'?" if near else " or ".join(verbs()),
            remedy=f"python -m data {near[0] if near else 'scan'} " + " ".join(rest if near else words),
        )
    module = _module(verb)
    if asks:
        print(module.usage())
        return 0
    code: int = module.main(rest)
    return code


def verbs() -> list[str]:
    """The files of data/verbs/."""
    return sorted(path.stem for path in VERBS.glob("[a-z]*.py"))


def usage() -> str:
    """How each verb is written."""
    return "\n\n\n".join(_module(verb).usage() for verb in verbs())


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"data.verbs.{verb}")


if __name__ == "__main__":
    run_guarded(lambda: main(sys.argv[1:]))
