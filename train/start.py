"""From a prepared run folder to running ranks on this node: torchrun's command, its environment, and the exec."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from anchorformer.devices import Device
from anchorformer.errors import UserError
from train.compose import ROOT
from train.config import RunConfig
from train.faults.interrupt import heeded
from train.network import Link, check_port, find_link, wait_for_head
from train.run.folder import RunFolder
from train.run.process import AGENT

HEAD_PORT = 29400
NOT_INHERITED = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", AGENT,
)  # fmt: skip
"""What an outer torchrun or Slurm step may have left: ranks started here must not take it for their own."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where this node stands among the nodes of a run; the defaults are a run on one machine.

    Attributes:
        head: host name or address of the node that hosts the rendezvous.
        node: this node's number; 0 is the head. Said, not guessed: a host name that resolves to 127.0.0.1 defeats
            guessing.
        num_nodes: how many nodes Slurm has started; None where it has not.
        address: this node's address as the others reach it, where the user says it; None looks it up.
        job: the same word on all nodes and another for each start, so that what is left of an earlier one joins no
            later one; None takes the config's hash and how often the run has been launched.
    """

    head: str | None = None
    port: int = HEAD_PORT
    node: int = 0
    num_nodes: int | None = None
    address: str | None = None
    job: str | None = None

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> Topology:
        """Reads HEAD_ADDR, HEAD_PORT, NODE_RANK, NODE_ADDR and JOB_ID, as launch/ sets them, and Slurm's SLURM_NNODES.

        Raises:
            UserError: one that should be a whole number is not.
        """
        return cls(
            head=variables.get("HEAD_ADDR"),
            port=_whole(variables, "HEAD_PORT") or HEAD_PORT,
            node=_whole(variables, "NODE_RANK") or 0,
            num_nodes=_whole(variables, "SLURM_NNODES"),
            address=variables.get("NODE_ADDR"),
            job=variables.get("JOB_ID"),
        )


def check_nodes(config: RunConfig, topology: Topology) -> None:
    """Refuses what would become one run too many, or one that waits for nodes that never come.

    Raises:
        UserError: a node beyond `hardware.nodes`, or another number of nodes than Slurm has started.
    """
    nodes = config.hardware.nodes
    if topology.node >= nodes:
        found, right = f"NODE_RANK={topology.node}", topology.node + 1
    elif topology.num_nodes not in (None, nodes):
        found, right = f"SLURM_NNODES={topology.num_nodes}", topology.num_nodes
    else:
        return
    raise UserError(
        f"the run is composed for hardware.nodes={nodes}", found=found, expected=f"exactly {nodes} node(s)",
        remedy=f"compose it with hardware.nodes={right} (for two nodes of eight: hardware=a100x8_2nodes), or start "
        f"{nodes} node(s): sbatch --nodes={nodes}",
    )  # fmt: skip


def check_devices(config: RunConfig) -> None:
    """Finds before any rank is started what each of them would find: a CUDA device for every rank of this machine.

    Raises:
        UserError: CUDA is asked for, or taken by `auto`, and there are fewer devices than ranks.
    """
    device, ranks = config.hardware.device, config.hardware.ranks
    if device is Device.cpu:
        return
    count = _num_cuda_devices()
    if count >= ranks or (device is Device.auto and count == 0):
        return
    raise UserError(
        f"hardware.device={device.value}, but {count} CUDA device(s) are visible for {ranks} rank(s)",
        found=f"{count} CUDA device(s)", expected=f"{ranks}, one for each rank",
        remedy="hardware=cpu" if count == 0 else f"hardware.ranks={count}, or hardware=cpu",
    )  # fmt: skip


def link(folder: Path, config: RunConfig, topology: Topology) -> Link | None:
    """This node's place in the network of the run; None for a run on one machine.

    Raises:
        UserError: a run of several nodes without the address of the head, and what `train.network` raises.
    """
    nodes = config.hardware.nodes
    if nodes == 1:
        return None
    if topology.head is None:
        raise UserError(
            f"this run needs {nodes} nodes", found="no HEAD_ADDR in the environment",
            expected="the address of one node, the same on all", remedy=f"on each node: HEAD_ADDR=<host> NODE_RANK=<i> "
            f"launch/multinode.sh {folder} {config.digest}",
        )  # fmt: skip
    return find_link(topology.head, topology.port, topology.node, topology.address, os.environ)


def command(folder: Path, config: RunConfig, topology: Topology, place: Link | None = None) -> list[str]:
    """The agent's command line for this node.

    Args:
        place: see `link`; None for a run on one machine.
    """
    hardware = config.hardware
    if place is None:
        # Its own name need not resolve, and its ranks need no network.
        where = ["--standalone", "--local-addr=127.0.0.1"]
    else:
        where = [
            f"--nnodes={hardware.nodes}", "--rdzv-backend=c10d",
            f"--rdzv-id={topology.job or f'{config.digest[:16]}.{RunFolder(folder).launch}'}",
            f"--rdzv-endpoint={topology.head}:{topology.port}", f"--rdzv-conf=is_host={int(topology.node == 0)}",
            f"--local-addr={place.address}",
        ]  # fmt: skip
    # A signal that the agent did not handle would leave its ranks behind as orphans.
    handed_on = (*heeded(), signal.SIGQUIT)
    return [
        sys.executable, "-m", "train.faults.agent", *where, f"--nproc-per-node={hardware.ranks}",
        f"--max-restarts={hardware.max_restarts}",
        f"--signals-to-handle={','.join(number.name for number in handed_on)}", "-m", "train.rank", str(folder),
    ]  # fmt: skip


def environment(config: RunConfig, inherited: Mapping[str, str], place: Link | None = None) -> dict[str, str]:
    """What the ranks find in their environment, beside what this process was given, which goes before.

    Args:
        place: see `link`.
    """
    env = {k: v for k, v in inherited.items() if k not in NOT_INHERITED and not k.startswith("TORCHELASTIC_")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = config.hardware.threads or max(1, cores // config.hardware.ranks)
    env["OMP_NUM_THREADS"] = str(threads)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH")]))
    # ninja and other tools lie beside the interpreter, also where the environment was not activated.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
    # A store shared with the agent still holds a dead attempt's addresses after a restart.
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(config.watchdog.shutdown_seconds)
    # Whoever reads a file with torch in a rank, DeepSpeed among them, gets tensors and no programs.
    env["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if config.hardware.device is Device.cpu or (config.hardware.device is Device.auto and _num_cuda_devices() == 0):
        env["DS_ACCELERATOR"] = "cpu"
    defaults = {
        "TOKENIZERS_PARALLELISM": "false",  # forked data workers would warn about every tokenizer
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",  # the one thing that goes out in spite of offline
        **(place.variables if place else {}),
    }
    return {**defaults, **env}


def meet(folder: Path, config: RunConfig, topology: Topology) -> Link | None:
    """`link`, and on the head the port is free, and on another node the head listens.

    Raises:
        UserError: see `link`; a port that is taken, or a head that does not listen.
    """
    place = link(folder, config, topology)
    if place is not None and topology.head is not None:
        print(f"node {topology.node} of {config.hardware.nodes}: {place.address} on {place.interface}", flush=True)
        if topology.node == 0:
            check_port(topology.port)
        else:
            wait_for_head(topology.head, topology.port)
    return place


def start(folder: Path, config: RunConfig, topology: Topology, place: Link | None = None) -> NoReturn:
    """Becomes the agent: signals reach it and its exit code is ours, with nothing in between to pass them on.

    Args:
        place: see `meet`; None for a run on one machine.
    """
    argv = command(folder, config, topology, place)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(argv[0], argv, environment(config, os.environ, place))  # noqa: S606 (a list, no shell)


def _num_cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _whole(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name)
    if text is not None and not text.isdecimal():
        raise UserError(
            f"{name} is not a whole number", found=f"{name}={text}", expected="0, 1, 2, ...", remedy=f"correct {name}"
        )
    return None if text is None else int(text)
