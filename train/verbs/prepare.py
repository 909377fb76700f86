"""Composes, checks and writes the run folder, and says how each node starts its ranks."""

from __future__ import annotations

import sys

from train.compose import compose
from train.prepare import is_done, prepare, run_folder


def main(arguments: list[str]) -> int:
    """Prints `prepared <run folder> <config hash>` last, or `done <run folder>` where nothing is left to do.

    The hash lets every node check that it reads the config which was composed here.
    """
    composed = compose(arguments)
    if is_done(composed):
        print(f"done {run_folder(composed).path}")
        return 0
    folder = prepare(composed, sys.argv)
    words = f"{folder.path} {folder.read_config().digest}"
    print(f"on each node: HEAD_ADDR=<host> NODE_RANK=<i> launch/multinode.sh {words}")
    print(f"prepared {words}")
    return 0
