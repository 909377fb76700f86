"""What is kept of how ranks talk: by whom, over what, with which settings, and where they do not agree."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.train.ranks import Ranks
from train import distributed
from train.distributed import World, alone
from train.run import communication
from train.run.folder import RunFolder

HOSTS = ("node7", "node8")


def record(world: World, folder: str) -> Any:
    """On this rank, which believes to be on a node of its own with settings of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: HOSTS[world.rank])
        patch.setenv("NCCL_ALGO", ("Ring", "Tree")[world.rank])
        patch.setenv("NCCL_SOCKET_IFNAME", ("ens1", "ens2")[world.rank])
        patch.setenv("NCCL_AUTH_TOKEN", "s3cret")
        communication.record(RunFolder(Path(folder)), world)
    return list(communication.uneven(world.gather(communication.facts(world))))


def test_what_two_ranks_talk_over(pair: Ranks, tmp_path: Path) -> None:
    for _ in range(2):
        pair.run(record, folder=str(tmp_path))
    text = (tmp_path / "communication.json").read_text()
    assert "s3cret" not in text
    told = json.loads(text)
    assert [one["ranks"] for one in told["ranks"]] == [[0], [1]]
    for number, one in enumerate(told["ranks"]):
        assert one["host"] == HOSTS[number]
        assert one["interfaces"] == {"lo": ["127.0.0.1"]}, "where the ranks of this test meet"
        assert one["variables"]["NCCL_AUTH_TOKEN"] == "***"
        default, control = one["groups"][:2]
        assert default["description"] == "default_pg"
        assert control["description"] == "control"
        for group in (default, control):
            assert (group["backend"], group["ranks"]) == ("gloo", "all")
            assert group["timeout_seconds"] == distributed.TIMEOUT.total_seconds()
    [earlier] = told["before"]
    assert earlier["ranks"] == told["ranks"], "each start is kept"


def test_ranks_that_are_alike_are_told_of_once(tmp_path: Path) -> None:
    one = communication.facts(alone())
    communication._write(RunFolder(tmp_path), [one, one | {"host": "else"}, one])
    told = json.loads((tmp_path / "communication.json").read_text())
    assert [entry["ranks"] for entry in told["ranks"]] == [[0, 2], [1]]


def test_settings_that_differ_are_named() -> None:
    def rank(nccl: str = "2.27.5", **variables: str) -> dict[str, Any]:
        return {"torch": "2.13.0", "nccl": nccl, "variables": variables}

    same = rank(NCCL_ALGO="Ring")
    assert list(communication.uneven([same, same])) == []
    ranks = [rank(NCCL_ALGO="Ring", NCCL_SOCKET_IFNAME="ens1"), *[same] * 6, rank("2.21.5", NCCL_SOCKET_IFNAME="ens2")]
    assert list(communication.uneven(ranks)) == [
        ("NCCL_ALGO", "Ring on rank 0, 1, 2, 3 and 3 more; not set on rank 7"),
        ("nccl", "2.27.5 on rank 0, 1, 2, 3 and 3 more; 2.21.5 on rank 7"),
    ]


@pytest.mark.parametrize(
    ("level", "own", "expected"),
    [("INFO", None, "nccl_rank_3.log"), ("trace", None, "nccl_rank_3.log"), ("WARN", None, None), (None, None, None),
     ("INFO", "/elsewhere/%h.log", "/elsewhere/%h.log")],
)  # fmt: skip
def test_nccl_s_own_log_lies_beside_the_rank_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, level: str | None,
    own: str | None, expected: str | None,
) -> None:  # fmt: skip
    for name, value in (("NCCL_DEBUG", level), ("NCCL_DEBUG_FILE", own)):
        if value is None:
            monkeypatch.setenv(name, "")  # so that it is taken back at the end
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO):
        communication.keep_nccl_log(RunFolder(tmp_path), 3)
    found = os.environ.pop("NCCL_DEBUG_FILE", None)
    assert (found or "").endswith(expected or "")
    assert (found is None) == (expected is None)
    assert (found or "NCCL") in caplog.text or expected is None
