"""From a prepared run folder to running ranks on this node: torchrun's command, its environment, and the exec."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from anchorformer.errors import UserError
from train.compose import ROOT
from train.config import Device, RunConfig

HEAD_PORT = 29400
NOT_INHERITED = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
"""What an outer torchrun or Slurm step may have left: ranks started here must not take it for their own."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where this node stands among the nodes of a run; the defaults are a run on one machine.

    Attributes:
        head: host name or address of the node that hosts the rendezvous.
        is_head: whether this node is it. Said, not guessed: a host name that resolves to 127.0.0.1 defeats guessing.
        address: this node's address as the others reach it; None leaves it to torchrun.
        job: the same word on all nodes and another for each start.
    """

    head: str | None = None
    port: int = HEAD_PORT
    is_head: bool = True
    address: str | None = None
    job: str = "anchorformer"

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> Topology:
        """Reads HEAD_ADDR, HEAD_PORT, NODE_RANK, NODE_ADDR and JOB_ID, as launch/ sets them."""
        return cls(
            head=variables.get("HEAD_ADDR"),
            port=int(variables.get("HEAD_PORT", HEAD_PORT)),
            is_head=variables.get("NODE_RANK", "0") == "0",
            address=variables.get("NODE_ADDR"),
            job=variables.get("JOB_ID", cls.job),
        )


def command(folder: Path, config: RunConfig, topology: Topology) -> list[str]:
    """The agent's command line for this node.

    Raises:
        UserError: a run of several nodes without the address of the head.
    """
    hardware = config.hardware
    if hardware.nodes == 1:
        where = ["--standalone"]
    elif topology.head is None:
        raise UserError(
            f"this run needs {hardware.nodes} nodes", found="no HEAD_ADDR in the environment",
            expected="the address of one node, the same on all", remedy=f"on each node: HEAD_ADDR=<host> NODE_RANK=<i> "
            f"launch/multinode.sh {folder} {config.digest}",
        )  # fmt: skip
    else:
        where = [
            f"--nnodes={hardware.nodes}", "--rdzv-backend=c10d", f"--rdzv-id={topology.job}",
            f"--rdzv-endpoint={topology.head}:{topology.port}", f"--rdzv-conf=is_host={int(topology.is_head)}",
            *([f"--local-addr={topology.address}"] if topology.address else []),
        ]  # fmt: skip
    return [
        sys.executable, "-m", "train.agent", *where, f"--nproc-per-node={hardware.ranks}", "--max-restarts=0",
        "-m", "train.rank", str(folder),
    ]  # fmt: skip


def environment(config: RunConfig, inherited: Mapping[str, str]) -> dict[str, str]:
    """What the ranks find in their environment, beside what this process was given."""
    env = {k: v for k, v in inherited.items() if k not in NOT_INHERITED and not k.startswith("TORCHELASTIC_")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = config.hardware.threads or max(1, cores // config.hardware.ranks)
    env["OMP_NUM_THREADS"] = str(threads)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH")]))
    # ninja and other tools lie beside the interpreter, also where the environment was not activated.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
    # A store shared with the agent still holds a dead attempt's addresses after a restart.
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if config.hardware.device is Device.cpu or (config.hardware.device is Device.auto and not _has_cuda()):
        env["DS_ACCELERATOR"] = "cpu"
    defaults = {
        "TOKENIZERS_PARALLELISM": "false",  # forked data workers would warn about every tokenizer
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",  # the one thing that goes out in spite of offline
    }
    return {**defaults, **env}


def start(folder: Path, config: RunConfig, topology: Topology) -> NoReturn:
    """Becomes the agent: signals reach it and its exit code is ours, with nothing in between to pass them on."""
    argv = command(folder, config, topology)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(argv[0], argv, environment(config, os.environ))  # noqa: S606 (a list, no shell)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
