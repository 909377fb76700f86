"""One rank of a run, as torchrun starts it: `python -m train.rank <run folder>`; it never sees Hydra."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
import transformers

import anchorformer.auto  # noqa: F401 (makes the model and its processor known to transformers)
from anchorformer.errors import UserError, run_guarded
from anchorformer.kernels import backend
from train import checkpoint, distributed
from train.affinity import bind_near
from train.compute import set_computation
from train.config import RunConfig
from train.distributed import World
from train.engine import build_engine, loading
from train.faults import interrupt
from train.faults.black_box import LOST, BlackBox, cause_of
from train.faults.interrupt import Interrupted, StopRequest
from train.faults.progress import Phase, Progress
from train.faults.replay import Order, replay
from train.faults.watchdog import Watchdog
from train.features import cache_of
from train.lora import add_adapter
from train.observe.journal import read_lines
from train.precision import choose_dtype
from train.repro import naming_what_is_not_deterministic, set_determinism
from train.run import communication, environment
from train.run.folder import RunFolder
from train.run.identity import check_ranks_agree, identify, seen_first
from train.run.process import AGENT, end_with_parent
from train.stage import freeze, render, table, trained_digest
from train.trainer import Run, train

# Under torchrun this file is `__main__`, which would tell a reader of the log nothing.
log = logging.getLogger("train.rank")

OWN_LOGGERS = ("anchorformer", "data", "train")
"""What is worth a line at INFO; of other packages only warnings are."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Joins the other ranks, loads, trains, and leaves the run's folder complete.

    Returns:
        0, or what `train.faults.interrupt` says where a signal has stopped the run and its state is saved.
    """
    parser = argparse.ArgumentParser(prog="python -m train.rank", description=__doc__)
    parser.add_argument("run_folder", type=Path)
    folder = RunFolder(parser.parse_args(arguments).run_folder.resolve())
    rank = int(os.environ.get("RANK", "0"))
    start_logging(folder, rank)
    progress = Progress()
    try:
        with environment.discreet(), StopRequest() as stop, BlackBox(folder, rank, progress) as box:
            config = folder.read_config()
            box.config = config.digest
            prepare_process(config)
            with Watchdog(config.watchdog, folder, rank, config.world_size, progress, box):
                communication.keep_nccl_log(folder, rank)
                timeout = timedelta(seconds=config.watchdog.collective_seconds)
                world = distributed.start(config.hardware.device, timeout)
                box.device = world.device
                check_ranks_agree(world.gather(seen_first(config)))
                with naming_what_is_not_deterministic():
                    run_rank(config, folder, world, progress, stop)
    except Interrupted as interruption:
        log.warning("%s; with resume=auto the same command goes on from there", interruption)
        return interrupt.EXIT_CODE
    except UserError as error:
        # Every rank may get here, together (a halted run) or alone (a broken record of its own).
        try:
            folder.write_halted(error.exit_code, str(error))
        except OSError as failure:
            # The exit code still tells the agent that this rank has ended on purpose.
            log.error("the reason could not be left in %s (%s): %s", folder.halted.name, failure, error)
        raise
    distributed.stop()
    return 0


def run_rank(
    config: RunConfig, folder: RunFolder, world: World, progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> None:  # fmt: skip
    """Builds everything a run is made of and trains; the process group is joined already."""
    from transformers import AutoProcessor

    from anchorformer.weights import check_folder, load_model
    from data.loader import Loader

    progress, stop = progress or Progress(), stop or StopRequest()
    # Cheapest first: what can be wrong with the folder, the checkpoint or the data is found before weights are loaded.
    progress.enter(Phase.reading)
    start = folder.start
    asked = config.model
    model_config = check_folder(
        start, asked.selector, asked.connector, tiling=asked.tiling, integration=asked.integration
    )
    position = checkpoint.find(folder.state, resume_from(config, folder, world), world)
    resumed = checkpoint.read_state(position, world, config) if position else None
    dtype = choose_dtype(config.hardware.precision, world.device, model_config.text_config.hidden_size)
    processor = AutoProcessor.from_pretrained(start, local_files_only=True).with_template(config.stage.template)
    loader = Loader(
        config, processor, world.rank, world.size,
        state=resumed.loader if resumed else None, pin_memory=world.device.type == "cuda",
        skipped=world.broadcast(skipped_until(folder.metrics, resumed.step) if resumed and world.is_main else 0),
        features=cache_of(config, start, dtype, world.device),
    )  # fmt: skip
    if resumed:
        checkpoint.check_data(resumed, loader.data_fingerprint)
    if config.profiled is not None:  # once more: a resumed run may have another than the one it was prepared with
        config.profiled.check(loader.total_steps)

    progress.enter(Phase.loading)
    with loading(config, world, dtype):
        model = load_model(start, dtype, config.model.connector)
    if config.stage.lora is not None:
        add_adapter(model, config.stage.lora, config.seed, world.device)
    freeze(model, config.stage)
    set_computation(model, config.hardware)
    progress.enter(Phase.starting)
    engine = build_engine(model, config, world, loader.total_steps, dtype)
    distributed.bound_waits(timedelta(seconds=config.watchdog.collective_seconds))
    communication.record(folder, world)
    log.info("stage %s on %d rank(s), %s\n%s", config.stage.name.value, world.size, world.device,
             render(table(engine.model, config.stage)))  # fmt: skip
    if position and resumed:
        checkpoint.restore(position, engine, world)
        log.info("resumed from %s after step %d", position, resumed.step)
    identity = identify(config, start, loader.data_fingerprint, loader.order_digest, trained_digest(engine.model))
    run = Run(
        config, folder, world, engine, processor, loader, loader.total_steps, resumed, progress, stop, identity=identity
    )  # fmt: skip
    order = Order.read(folder)
    if order is None:
        train(run)
    else:
        replay(run, order)


def resume_from(config: RunConfig, folder: RunFolder, world: World) -> str:
    """`config.resume` when the ranks of a launch start first; once they have saved, their newest checkpoint.

    torchrun may have started them again since, and does not tell all nodes alike that it has; but every launch counts
    itself in the folder, and every checkpoint says which one wrote it.
    """
    has_saved = world.is_main and config.resume != "auto" and checkpoint.has_saved(folder, config.resume)
    return world.broadcast("auto" if has_saved else config.resume)


def skipped_until(metrics: Path, step: int) -> int:
    """Samples that a run has left out of its steps up to one, as far as there is a record of them."""
    lines = [json.loads(line) for line in read_lines(metrics)]
    return sum(line["skipped"] for line in lines if line["step"] <= step)


def prepare_process(config: RunConfig) -> None:
    """Cores, threads, determinism and kernels of this process, before anything is computed."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.hardware.threads or max(1, cores // local_ranks))
    device = distributed.choose_device(config.hardware.device, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        bind_near(device.index)
    set_determinism(config)
    backend.use(config.hardware.kernels.value)


def start_logging(folder: RunFolder, rank: int) -> None:
    """All of this rank's log in its own file; rank 0's also on the terminal."""
    path = folder.log(rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    form = environment.Discreet("%(asctime)s %(levelname).1s %(name)s: %(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.FileHandler(path)]
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stdout))
    for handler in handlers:
        handler.setFormatter(form)
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    if rank != 0:
        # They would all draw over the same line of one terminal.
        transformers.utils.logging.disable_progress_bar()
    # DeepSpeed's call of a collective that torch is renaming; nothing that a reader of the log could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    sys.excepthook = partial(_log_crash, rank)


def _log_crash(rank: int, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # The ranks' output is interleaved on one terminal; each crash is also kept whole in the log of its own rank.
    if cause_of(error) == LOST:
        # Not the cause: the agent names the rank that failed first, and the black box has the traceback.
        log.error("this rank has lost its peers: %s", next(iter(str(error).splitlines()), kind.__name__))
        return
    log.critical("this rank crashed", exc_info=(kind, error, trace))
    if rank != 0:
        text = "".join(traceback.format_exception(kind, error, trace))
        print(environment.mask_values(text), file=sys.stderr)


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """`main` as all that this process is for."""
    if AGENT in os.environ:
        # An agent that is killed cannot end its ranks; they are then told to stop as it would have told them.
        end_with_parent(signal.SIGTERM, parent=int(os.environ[AGENT]))
    try:
        run_guarded(lambda: main(arguments))
    finally:
        # The loader's processes note signals as this one does, and outlive those that are to end them: its exit would
        # wait for them for ever.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            child.kill()


if __name__ == "__main__":
    run()
