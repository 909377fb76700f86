"""Starts this node's ranks of a prepared run: `start RUN_FOLDER CONFIG_HASH`, as `prepare` printed them.

With `--dry-run` it prints the run's config, this node's command and the plan instead, and writes nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from anchorformer.errors import UserError
from train.preview import preview
from train.run.folder import RunFolder
from train.run.lock import acquired, end_orphans
from train.start import Topology, check_devices, check_nodes, command, link, meet, start

DRY_RUN = "--dry-run"


def main(arguments: list[str]) -> int:
    """Starts, at the place among the nodes that the environment names (launch/multinode.sh).

    Raises:
        UserError: this node reads another config than the node that composed it, is one too many for it, has fewer
            devices than ranks, or does not reach the others; another launch holds the run, or its ranks do not end.
    """
    words = [word for word in arguments if word != DRY_RUN]
    if len(words) != 2:
        raise UserError(
            "start takes two words", found=" ".join(arguments) or "none", expected="RUN_FOLDER CONFIG_HASH",
            remedy="python -m train prepare ... prints both",
        )  # fmt: skip
    folder, expected = Path(words[0]), words[1]
    config = RunFolder(folder).read_config()
    if config.digest != expected:
        raise UserError(
            f"this node reads another config of {folder}", found=config.digest, expected=expected,
            remedy="all nodes must see the same run folder, written by one `python -m train prepare`",
        )  # fmt: skip
    topology = Topology.from_environment(os.environ)
    check_nodes(config, topology)
    if DRY_RUN in arguments:
        print(preview(config, command(folder, config, topology, link(folder, config, topology))))
        return 0
    check_devices(config)
    if topology.node != 0:
        end_orphans(folder)
        return start(folder, config, topology, meet(folder, config, topology))
    # The head speaks for all nodes: no rank of the others gets anywhere before it has started.
    with acquired(folder):
        place = meet(folder, config, topology)
        RunFolder(folder).forget_last_end()
        return start(folder, config, topology, place)
