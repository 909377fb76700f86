"""Says how two runs differ, in config, environment, data, order, trained set and records: `diff RUN_A RUN_B`."""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path

from anchorformer.errors import UserError
from train.run.diff import compare
from train.run.folder import RunFolder


def main(arguments: list[str]) -> int:
    """Prints the differences, section by section.

    Returns:
        0 where nothing differs that numbers depend on, 1 otherwise.

    Raises:
        UserError: other than two run folders are named.
    """
    if len(arguments) != 2:
        raise UserError(
            "diff takes two words", found=" ".join(arguments) or "none", expected="RUN_A RUN_B",
            remedy="e.g. python -m train diff checkpoints/one checkpoints/other",
        )  # fmt: skip
    found = list(compare(*(RunFolder(Path(name)) for name in arguments)))
    for section, differences in groupby(found, key=lambda one: one.section):
        print(f"{section}:")
        for one in differences:
            print(f"  {one.key}: {_short(one.one)} | {_short(one.other)}")
    is_same = not any(one.is_of_numbers for one in found)
    print(f"{os.path.normpath(arguments[0])} and {os.path.normpath(arguments[1])} have the same numbers" if is_same
          else f"{sum(one.is_of_numbers for one in found)} difference(s) that numbers depend on")  # fmt: skip
    return 0 if is_same else 1


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
