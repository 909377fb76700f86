"""The one exception for mistakes a user can mend, and how every entry point reports it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake in a config, a file or a command; entry points print it on one screen and exit with 2.

    Args:
        what: the problem in one line, naming the file, key or record.
        found: what is there.
        expected: what would have been right.
        remedy: the next thing to do.
    """

    exit_code = 2

    def __init__(self, what: str, *, found: object, expected: object, remedy: str) -> None:
        self.what, self.found, self.expected, self.remedy = what, str(found), str(expected), remedy
        super().__init__(f"{what}\n  found:    {found}\n  expected: {expected}\n  remedy:   {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and data workers send their errors by pickle.
        return _rebuild, (type(self), self.what, self.found, self.expected, self.remedy)


def _rebuild(cls: type[UserError], what: str, found: str, expected: str, remedy: str) -> UserError:
    return cls(what, found=found, expected=expected, remedy=remedy)


def run_guarded(main: Callable[[], int | None]) -> NoReturn:
    """Runs an entry point and leaves the process with its exit code.

    A `UserError` is printed on one screen without a traceback and exits with its `exit_code`; an interrupt exits with
    130 as a shell reports it; anything else is a fault of ours and keeps its traceback.

    Args:
        main: returns the exit code, None for 0.
    """
    try:
        code = main() or 0
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    raise SystemExit(code)
