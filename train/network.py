"""How the nodes of a run reach each other: this node's address and interface, the head's port; asked before the start.

torchrun and gloo guess from the host name, which on many machines resolves to loopback; what they make of that is a
timeout on another node. Here it is looked up, and what cannot work is said at once.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from anchorformer.errors import UserError

log = logging.getLogger(__name__)

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
PATIENCE = 600.0
"""Seconds that a node waits for the head to listen; as long as torchrun gives the nodes to come together."""
PERIOD = 1.0
"""Seconds between two tries."""


@dataclass(frozen=True)
class Link:
    """Where this node is on the network that the run uses.

    Attributes:
        address: as the other nodes reach it.
        interface: of this machine, the one that has the address.
    """

    address: str
    interface: str

    @property
    def variables(self) -> dict[str, str]:
        """What gloo and NCCL have to be told to use it; NCCL takes a name without `=` for the beginning of one."""
        return dict(zip(INTERFACE_VARIABLES, (self.interface, f"={self.interface}"), strict=True))


def find_link(head: str, port: int, node: int, address: str | None, variables: Mapping[str, str]) -> Link:
    """The way from this node to the head, or, where this is the head, the address that its name stands for.

    Args:
        head: host name or address of the node that hosts the rendezvous.
        node: this node's number; 0 is the head.
        address: what the user says it is; None looks it up.
        variables: the environment, in which the user may have named interfaces.

    Raises:
        UserError: a name that does not resolve, a head that is another machine than node 0, an address or interface
            that this machine does not have, several addresses to choose from.
    """
    own = own_addresses()
    for name in INTERFACE_VARIABLES[:1]:  # NCCL's is a pattern
        if name in variables and variables[name] not in own.values():
            raise UserError(
                f"{name} names no interface of this machine", found=f"{name}={variables[name]}",
                expected=f"one of {', '.join(sorted(set(own.values())))}", remedy=f"correct {name}, or unset it",
            )  # fmt: skip
    if address is None:
        address = _look_up(head, port, node, own)
    if address not in own:
        raise UserError(
            "NODE_ADDR is no address of this machine", found=f"NODE_ADDR={address}", expected=_listed(own),
            remedy="correct NODE_ADDR, or unset it",
        )  # fmt: skip
    return Link(address, own[address])


def own_addresses() -> dict[str, str]:
    """Address -> interface, of this machine; one that has just come up has no carrier for a moment, and counts."""
    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)
    }  # fmt: skip


def _look_up(head: str, port: int, node: int, own: Mapping[str, str]) -> str:
    try:
        family, _, _, _, place = socket.getaddrinfo(head, port, type=socket.SOCK_DGRAM)[0]
    except socket.gaierror as error:
        raise UserError(
            f"HEAD_ADDR={head} does not resolve on this node", found=str(error), expected="a host name or an address",
            remedy="set HEAD_ADDR to the head's address, the same on all nodes",
        ) from None  # fmt: skip
    found = str(place[0])
    is_here = found in own or ipaddress.ip_address(found).is_loopback  # 127.0.1.1 is no interface's
    if is_here != (node == 0):
        raise UserError(
            f"HEAD_ADDR={head} and NODE_RANK={node} contradict each other",
            found=f"{head} is {found}, " + ("an address of this node" if is_here else "another machine's"),
            expected="NODE_RANK=0 on the node that HEAD_ADDR names, and on no other",
            remedy="correct one of them; where a name of the head cannot say it, set NODE_ADDR to this node's address",
        )  # fmt: skip
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing: connecting only asks for the route
        try:
            probe.connect(place)
        except OSError as error:
            raise UserError(
                f"there is no way from this node to HEAD_ADDR={head}", found=f"{found}: {error.strerror}",
                expected="an address in a network that this node is in", remedy="correct HEAD_ADDR, or the routes",
            ) from None  # fmt: skip
        address = str(probe.getsockname()[0])
    if not ipaddress.ip_address(address).is_loopback:
        return address
    # The head's own name is loopback on it, as Debian writes it into /etc/hosts; to the other nodes it is not.
    reachable = {address: name for address, name in own.items() if _is_reachable(address)}
    if len(reachable) != 1:
        raise UserError(
            f"HEAD_ADDR={head} is {found} on this node, which no other node can reach", found=_listed(reachable),
            expected="one address that the other nodes reach",
            remedy="set NODE_ADDR to the one of them in the nodes' network, or correct /etc/hosts",
        )  # fmt: skip
    [address] = reachable
    log.warning("%s is %s on this node; the others are told %s (%s)", head, found, address, reachable[address])
    return address


def _is_reachable(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return parsed.version == 4 and not parsed.is_loopback and not parsed.is_link_local


def _listed(addresses: Mapping[str, str]) -> str:
    return ", ".join(f"{address} ({name})" for address, name in addresses.items()) or "none"


def check_port(port: int) -> None:
    """Finds on the head what torchrun would only find after a minute.

    Raises:
        UserError: something listens there already, or this user may not.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store does: a port just left is free
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            with socket.socket() as other:
                other.bind(("", 0))
                free = other.getsockname()[1]
            raise UserError(
                f"HEAD_PORT={port} cannot be listened on", found=error.strerror, expected="a free port of the head",
                remedy=f"set HEAD_PORT to another one on all nodes, e.g. {free}; `ss -ltnp sport = :{port}` says who "
                "has it",
            ) from None  # fmt: skip


def wait_for_head(head: str, port: int) -> None:
    """Returns when the head listens, so that nodes may be started in any order.

    Raises:
        UserError: it does not within `PATIENCE`.
    """
    deadline, is_told = time.monotonic() + PATIENCE, False
    while True:
        try:
            socket.create_connection((head, port), timeout=PERIOD * 5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"the head does not listen on {head}:{port}", found=f"{error} for {PATIENCE:g} s",
                    expected="node 0 of this run, started with the same HEAD_ADDR and HEAD_PORT",
                    remedy="start it; if it runs, open its ports to this node (HEAD_PORT, and those that are picked "
                    "freely for the ranks)",
                ) from None  # fmt: skip
        else:
            return
        if not is_told:
            log.warning("waiting for the head to listen on %s:%d", head, port)
            is_told = True
        time.sleep(PERIOD)
