"""Composes, checks, writes the run folder and starts its ranks on this machine (the default verb)."""

from __future__ import annotations

import sys
from pathlib import Path

from anchorformer.errors import UserError
from train.compose import compose
from train.network import Link
from train.prepare import is_done, prepare, run_folder
from train.preview import config_text, preview
from train.start import Topology, command, start

CFG, DRY_RUN = "--cfg", "--dry-run"


def main(arguments: list[str]) -> int:
    """`--cfg` prints the composed config, `--dry-run` the command and the plan as well; neither touches a file."""
    overrides = [text for text in arguments if not text.startswith("--")]
    flags = [text for text in arguments if text.startswith("--")]
    if CFG in flags:
        # `--cfg job` is how Hydra's own commands spell it.
        overrides = [text for text in overrides if text != "job"]
    unknown = sorted(set(flags) - {CFG, DRY_RUN})
    if unknown:
        raise UserError(
            "unknown flag", found=" ".join(unknown), expected=f"{CFG} or {DRY_RUN}", remedy="values are key=value"
        )
    config = compose(overrides)
    if DRY_RUN in flags:
        path, place = Path(config.output_root) / config.run, Link("NODE_ADDR", "INTERFACE")
        argv = command(path, config, Topology(head="HEAD_ADDR"), place if config.hardware.nodes > 1 else None)
        print(preview(config, argv))
        return 0
    if CFG in flags:
        print(config_text(config))
        return 0
    if config.hardware.nodes > 1:
        raise UserError(
            "several nodes are not started by this command", found=f"hardware.nodes={config.hardware.nodes}",
            expected="one node", remedy="python -m train prepare ... prints what to run on each node",
        )  # fmt: skip
    if config.rehearse:
        from train.rehearse import rehearse  # imports torch

        for line in rehearse(config, sys.argv):
            print(f"proved: {line}")
        return 0
    if is_done(config):
        print(f"{run_folder(config).path} is done already")
        return 0
    folder = prepare(config, sys.argv)
    print(f"run folder: {folder.path}")
    return start(folder.path, folder.read_config(), Topology())
