"""What the ranks talk over: backends of their process groups, interfaces, settings of NCCL and gloo, in one file."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from train.distributed import World, process_groups
from train.run.environment import variables
from train.run.folder import RunFolder, write_atomically
from train.writing import together

log = logging.getLogger(__name__)

SETTINGS = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_GLOO_", "TORCH_DISTRIBUTED_")
"""Beginnings of the variables by which communication is set up."""
OF_A_NODE = ("_IFNAME", "_HCA", "_FILE")
"""Ends of those that name something of the node or the rank, and so may rightly differ."""
CHATTY = ("INFO", "TRACE")
"""Levels of NCCL_DEBUG at which every rank writes hundreds of lines."""
INFINIBAND = Path("/sys/class/infiniband")


def keep_nccl_log(folder: RunFolder, rank: int) -> None:
    """Has NCCL write what NCCL_DEBUG asks for beside this rank's log; on the terminal all ranks' would be mixed.

    Call it before the process group is joined. NCCL_DEBUG_FILE, where it is set, stays.
    """
    if os.environ.get("NCCL_DEBUG", "").upper() in CHATTY:
        os.environ.setdefault("NCCL_DEBUG_FILE", str(folder.nccl_log(rank)))
        log.info("NCCL writes its log into %s", os.environ["NCCL_DEBUG_FILE"])


def record(folder: RunFolder, world: World) -> None:
    """Writes down what all ranks communicate over, into `communication.json`; all ranks call it, once they are joined.

    Raises:
        UserError: the file cannot be written; on all ranks.
    """
    mine = facts(world)
    log.info("%s", _in_words(mine))
    ranks = world.gather(mine)
    with together(world, folder.communication):
        if world.is_main:
            for name, values in uneven(ranks):
                log.warning("%s is not the same on all ranks: %s", name, values)
            _write(folder, ranks)


def facts(world: World) -> dict[str, Any]:
    """What this rank communicates over."""
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type,
        "torch": torch.__version__,
        "nccl": nccl_version(),
        "groups": process_groups(world.size),
        "interfaces": interfaces(),
        "infiniband": sorted(path.name for path in INFINIBAND.glob("*")),
        "variables": variables({name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}),
    }


def nccl_version() -> str | None:
    """Of the NCCL that torch brings; None where it has none."""
    if not dist.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def interfaces() -> dict[str, list[str]]:
    """Network interface -> addresses on it over which this process has connections at the moment.

    So it is what has been chosen, by whom and why ever. InfiniBand's own connections are none of these.
    """
    names = {
        _bare(address.address): name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    found: dict[str, set[str]] = {}
    for connection in psutil.Process().net_connections("tcp"):
        if connection.status == psutil.CONN_ESTABLISHED:
            address = _bare(connection.laddr.ip)
            found.setdefault(names.get(address, "unknown"), set()).add(address)
    return {name: sorted(addresses) for name, addresses in sorted(found.items())}


def uneven(ranks: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Settings and versions that ranks do not share, and which ranks have which; not those that name a node's parts."""
    told = [{"torch": rank["torch"], "nccl": rank["nccl"], **rank["variables"]} for rank in ranks]
    for name in sorted({name for one in told for name in one}):
        of_value: dict[str, list[int]] = {}
        for rank, one in enumerate(told):
            of_value.setdefault(str(one.get(name, "not set")), []).append(rank)
        if len(of_value) > 1 and not name.endswith(OF_A_NODE):
            yield name, "; ".join(f"{value} on rank {_few(numbers)}" for value, numbers in of_value.items())


def _write(folder: RunFolder, ranks: Sequence[Mapping[str, Any]]) -> None:
    path = folder.communication
    earlier = json.loads(path.read_text()) if path.is_file() else None
    before = [] if earlier is None else [*earlier.pop("before"), earlier]
    alike: dict[str, list[int]] = {}
    for rank, one in enumerate(ranks):
        alike.setdefault(json.dumps(one), []).append(rank)
    told = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "launch": folder.launch,
        "ranks": [{"ranks": numbers, **json.loads(one)} for one, numbers in alike.items()],
        "before": before,
    }
    write_atomically(path, json.dumps(told, indent=2) + "\n")


def _in_words(mine: Mapping[str, Any]) -> str:
    groups = ", ".join(f"{group['backend']} ({group['description']})" for group in mine["groups"])
    over = ", ".join(f"{name} ({' '.join(addresses)})" for name, addresses in mine["interfaces"].items())
    settings = " ".join(f"{name}={value}" for name, value in mine["variables"].items())
    return (
        f"{mine['host']}, {mine['device']}: process groups {groups or 'none'}; connections over {over or 'nothing'}; "
        f"NCCL {mine['nccl'] or 'none'}; set: {settings or 'nothing'}"
    )


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (f" and {len(numbers) - 4} more" if len(numbers) > 4 else "")


def _bare(address: str) -> str:
    """Without the interface that a local address of IPv6 carries; of an IPv4 address in IPv6's form, that address."""
    return address.partition("%")[0].removeprefix("::ffff:")
