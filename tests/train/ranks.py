"""Two real ranks that outlive a test: they are spawned once and run one job after the other."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from anchorformer.devices import Device
from train import distributed

SECONDS = 180
"""Longest job."""
NO_EXTENSIONS = "/nonexistent/torch-extensions"
"""Where anything that is compiled would have to go."""


class RanksFailed(AssertionError):
    """A job raised on at least one rank; holds every rank's traceback."""


class Ranks:
    """Processes joined by gloo (NCCL on CUDA); a job is a module-level function, called `job(world, **arguments)`."""

    def __init__(self, size: int = 2, device: Device = Device.cpu) -> None:
        self.size = size
        self.device = device
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, job: Callable[..., Any], **arguments: Any) -> list[Any]:
        """The job's results in rank order; after a failure the processes are replaced by fresh ones."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((inspect.getfile(job), job.__name__, arguments))
        results = [_answer(pipe) for pipe in self._pipes]
        errors = [f"rank {rank}: {value}" for rank, (kind, value) in enumerate(results) if kind == "error"]
        if errors:
            self.close()
            raise RanksFailed("\n".join(errors))
        return [value for _, value in results]

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, self.size, port, self.device, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _answer(pipe: Connection) -> tuple[str, Any]:
    try:
        return pipe.recv() if pipe.poll(SECONDS) else ("error", "no answer in time")
    except EOFError:
        return "error", "the process was killed"


def serve(rank: int, size: int, port: int, device: Device, pipe: Connection) -> None:
    """What a rank does until it is ended; on CPU it finds no compiler, as on a machine that has none."""
    if device is Device.cpu:
        os.environ |= {"PATH": "", "TORCH_EXTENSIONS_DIR": NO_EXTENSIONS}
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    world = distributed.start(device)
    while True:
        try:
            path, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = ("ok", getattr(_module(path), name)(world, **arguments))
        except Exception:  # noqa: BLE001 (whatever a job raises is the test's to judge)
            result = ("error", traceback.format_exc())
        pipe.send(result)


@cache
def _module(path: str) -> Any:
    # pytest's importlib mode gives test files names that nobody else can import, so a job's file is loaded by path.
    name = f"job_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
