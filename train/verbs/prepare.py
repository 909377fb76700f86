"""Composes, checks and writes the run folder, and says how its ranks are started."""

from __future__ import annotations

import os
import sys

from anchorformer.errors import UserError
from train.compose import compose
from train.prepare import is_done, prepare, run_folder
from train.run.lock import release
from train.start import Topology, check_nodes


def main(arguments: list[str]) -> int:
    """Prints `prepared <run folder> <config hash>` last, or `done <run folder>` where nothing is left to do.

    The hash lets every node check that it reads the config which was composed here.

    Raises:
        UserError: a rehearsal, whose two starts are its own; and what `prepare` raises.
    """
    composed = compose(arguments)
    if composed.rehearse:
        raise UserError(
            "a rehearsal is not prepared for others to start", found="rehearse=true", expected="a run",
            remedy="rehearse with `python -m train ... rehearse=true` on one node, then prepare without it",
        )  # fmt: skip
    # Inside a Slurm job the nodes are known already; a run folder for another number of them could never be started.
    check_nodes(composed, Topology.from_environment({**os.environ, "NODE_RANK": "0"}))
    if is_done(composed):
        print(f"done {run_folder(composed).path}")
        return 0
    folder = prepare(composed, sys.argv, starts_here=False)
    release(folder.path)
    words = f"{folder.path} {folder.read_config().digest}"
    if composed.hardware.nodes == 1:
        print(f"on the node: python -m train start {words}")
    else:
        print(f"on each node: HEAD_ADDR=<host> NODE_RANK=<i> launch/multinode.sh {words}")
    print(f"prepared {words}")
    return 0
