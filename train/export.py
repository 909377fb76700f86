"""The trained model as a folder like the run's start, and its adapter, complete and durable before the run is done."""

from __future__ import annotations

import logging
import math
import shutil
from typing import TYPE_CHECKING

from torch import nn

from anchorformer.model_folder import bytes_copied, derive_folder, partial_of, read_index, read_manifest
from train.adapter import merge, write_adapter
from train.checkpoint.room import check_room
from train.lora import is_adapter
from train.optim import full_shape
from train.run.folder import RunFolder
from train.writing import together

if TYPE_CHECKING:
    from train.trainer import Run

log = logging.getLogger(__name__)


def export(run: Run) -> None:
    """Writes the trained model into `<run>/model`; files of parts that were not trained are linked. All ranks call it.

    What an adapter has learnt goes into `<run>/adapter` first, and from there into the weights of the model.

    Raises:
        UserError: there is no room, or the disk does not take it; on all ranks, and nothing of it is left.
    """
    gathered = {part.value: run.engine.gather(part) for part in run.config.stage.trains}
    trained = {part: tensors for part, tensors in gathered.items() if tensors is not None}
    out = run.folder.model
    with together(run.world, out):
        if run.world.is_main:
            shutil.rmtree(partial_of(out), ignore_errors=True)  # what a kill has left may be what fills the disk
            check_room(run.folder.path, model_bytes(run.engine.model, run.folder), "the trained model")
            lora = run.config.stage.lora
            if lora is None:
                derive_folder(run.folder.start, trained, out, run.processor)
            else:
                tensors = {name: value for part in trained.values() for name, value in part.items()}
                write_adapter(run.folder.adapter, tensors, lora, run.folder.start, run.processor)
                log.info("wrote %s", run.folder.adapter)
                merge(run.folder.adapter, run.folder.start, out)
            log.info("wrote %s", out)


def model_bytes(model: nn.Module, folder: RunFolder) -> int:
    """Room that the trained model will take: its trained parts, and the others where the disk cannot link them."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    written = sum(math.prod(full_shape(value)) * value.element_size() for value in trained.values())
    adapted = {name.split(".", 1)[0] for name in trained if is_adapter(name)}
    if adapted:
        # The parts that the adapter goes into are as large as at the start.
        index, manifest = read_index(folder.start), read_manifest(folder.start)
        shards = {file for name, file in index.items() if name.split(".", 1)[0] in adapted}
        written = 2 * written + sum(manifest[file]["bytes"] for file in shards)
    return written + bytes_copied(folder.start, {name.split(".", 1)[0] for name in trained}, folder.path)
