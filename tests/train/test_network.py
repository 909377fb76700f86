"""What a node finds out about its network before it starts: address, interface, a free port, a head that listens."""

from __future__ import annotations

import errno
import socket
import threading
from typing import Any

import pytest

from anchorformer.errors import UserError
from train import network
from train.network import Link, find_link

OWN = {"127.0.0.1": "lo", "::1": "lo", "10.0.0.1": "eth0", "fe80::1": "eth0"}
HOSTS = {"node0": "10.0.0.1", "node1": "10.0.0.2", "debian0": "127.0.1.1", "local0": "127.0.0.1"}


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine with the addresses of `OWN`, on which the names of `HOSTS` resolve; eth0 leads to all of them."""
    own = dict(OWN)

    def resolve(name: str, port: int, **_: Any) -> list[Any]:
        if name not in HOSTS:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", (HOSTS[name], port))]

    class Probe:
        def __init__(self, *_: object) -> None:
            self.source = ""

        def connect(self, place: tuple[str, int]) -> None:
            if "eth0" not in own.values():
                raise OSError(errno.ENETUNREACH, "Network is unreachable")
            self.source = "127.0.0.1" if place[0].startswith("127.") else "10.0.0.1"

        def getsockname(self) -> tuple[str, int]:
            return self.source, 0

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: object) -> None:
            return None

    monkeypatch.setattr(network, "own_addresses", lambda: own)
    monkeypatch.setattr(network.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(network.socket, "socket", Probe)
    return own


def test_the_interface_is_the_one_on_the_way_to_the_head(node: dict[str, str]) -> None:
    assert find_link("node0", 1, 0, None, {}) == Link("10.0.0.1", "eth0")
    link = find_link("node1", 1, 1, None, {})
    assert link.variables == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}, "eth0 alone is eth01 too"
    assert find_link("node1", 1, 1, "127.0.0.1", {}) == Link("127.0.0.1", "lo"), "what the user says is not looked up"


@pytest.mark.parametrize("name", ["debian0", "local0"])
def test_a_head_whose_own_name_is_loopback_tells_its_other_address(node: dict[str, str], name: str) -> None:
    assert find_link(name, 1, 0, None, {}) == Link("10.0.0.1", "eth0")
    node["10.1.0.1"] = "ib0"
    with pytest.raises(UserError, match="which no other node can reach") as caught:
        find_link(name, 1, 0, None, {})
    assert caught.value.found == "10.0.0.1 (eth0), 10.1.0.1 (ib0)"
    assert find_link(name, 1, 0, "10.1.0.1", {}) == Link("10.1.0.1", "ib0")
    with pytest.raises(UserError, match="contradict"):
        find_link(name, 1, 1, None, {})


def test_contradictions_are_said_at_once(node: dict[str, str]) -> None:
    with pytest.raises(UserError, match="NODE_RANK=1 contradict") as caught:
        find_link("node0", 1, 1, None, {})
    assert caught.value.found == "node0 is 10.0.0.1, an address of this node"
    with pytest.raises(UserError, match="NODE_RANK=0 contradict"):
        find_link("node1", 1, 0, None, {})
    assert find_link("node1", 1, 0, "10.0.0.1", {}).interface == "eth0", "a name before the head, as of a service"
    with pytest.raises(UserError, match="does not resolve"):
        find_link("nowhere", 1, 1, None, {})
    with pytest.raises(UserError, match="no address of this machine"):
        find_link("node0", 1, 0, "10.0.0.7", {})
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME names no interface") as caught:
        find_link("node0", 1, 0, None, {"GLOO_SOCKET_IFNAME": "ib0"})
    assert caught.value.expected == "one of eth0, lo"
    node.clear()
    with pytest.raises(UserError, match="no way from this node"):
        find_link("node1", 1, 1, None, {})


def test_a_port_that_is_taken_is_found_before_the_start() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        with pytest.raises(UserError, match=f"HEAD_PORT={port} cannot be listened on") as caught:
            network.check_port(port)
    free = int(caught.value.remedy.partition("e.g. ")[2].partition(";")[0])
    network.check_port(free)
    network.check_port(port)


def test_nodes_start_in_any_order(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(network, "PERIOD", 0.02)
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        port = head.getsockname()[1]
        monkeypatch.setattr(network, "PATIENCE", 0.05)
        with pytest.raises(UserError, match=f"does not listen on 127.0.0.1:{port}") as caught:
            network.wait_for_head("127.0.0.1", port)
        assert "refused" in caught.value.found
        monkeypatch.setattr(network, "PATIENCE", 30.0)
        later = threading.Timer(0.1, head.listen)
        later.start()
        network.wait_for_head("127.0.0.1", port)
        later.join()
    assert f"waiting for the head to listen on 127.0.0.1:{port}" in caplog.text
