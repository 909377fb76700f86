"""From DeepSpeed's file per rank to whole tensors, through DeepSpeed's universal checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from anchorformer.errors import UserError
from train.engine.files import plain_pickles
from train.run.process import end_with_parent

WORKERS = 4
"""Processes that cut the files apart; each holds one rank's share of the state."""


class Universal:
    """Whole tensors of a folder that `convert` wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "zero"

    def weight(self, name: str) -> Tensor:
        return self._read(name, "fp32")

    def moment(self, name: str, kind: str) -> Tensor:
        return self._read(name, kind)

    def _read(self, name: str, kind: str) -> Tensor:
        # Mapped, so that a rank reads from disk only what it takes.
        found = torch.load(self._folder / name / f"{kind}.pt", map_location="cpu", weights_only=True, mmap=True)
        tensor: Tensor = found["param"] if isinstance(found, dict) else found
        return tensor.view(-1)


def convert(source: Path, target: Path) -> None:
    """Writes the shards of `source` as whole tensors below `target`, in a process of its own.

    It needs about twice the room of the shards while it runs, and that of the shards afterwards.

    Raises:
        UserError: DeepSpeed's converter has failed; with its last lines.
    """
    # The converter and its workers read pickles with `weights_only=False`, which this variable overrules.
    environment = {**os.environ, "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "train.engine.universal", str(source), str(target), str(os.getpid())]
    # A group of its own: it has workers, which have to go with it.
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            _, told = child.communicate()
        finally:
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
    if child.returncode != 0:
        raise UserError(
            f"{source} cannot be converted for another number of ranks", found=told.strip()[-2000:],
            expected="files that DeepSpeed's ds_to_universal reads",
            remedy="resume on the number of ranks that wrote it",
        )  # fmt: skip


def main(source: str, target: str, parent: str) -> None:
    """The process of its own, which ends with the one that has started it."""
    main_pid = os.getpid()

    def end(*_: object) -> None:
        # The workers, which inherit this, are ended one by one when their work is done; the main process by its parent.
        os.killpg(0, signal.SIGKILL) if os.getpid() == main_pid else os._exit(1)

    signal.signal(signal.SIGTERM, end)
    end_with_parent(signal.SIGTERM, int(parent))
    from deepspeed.checkpoint import ds_to_universal

    with plain_pickles():
        ds_to_universal.main(
            Namespace(
                input_folder=source, output_folder=target, num_extract_workers=WORKERS, num_merge_workers=WORKERS,
                keep_temp_folder=False, strict=True, inject_missing_state=True,
            )
        )  # fmt: skip
    for copied in Path(target).glob("mp_rank_*"):
        copied.unlink()  # the model's own low-precision weights, which follow from the fp32 ones
    Path(target).with_name("latest_universal").unlink(missing_ok=True)  # for DeepSpeed's own loader


if __name__ == "__main__":
    main(*sys.argv[1:])
