"""What the agent makes of its ranks' ends, and how long it waits for them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

from train.faults import agent, interrupt
from train.run.folder import RunFolder


def test_ranks_that_end_on_purpose_have_the_last_word_before_their_files_are_seen(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for code in (2, 3, 75):
        assert agent._last_word(folder, {0: -signal.SIGTERM, 1: code}) == code
        assert agent._explain(folder, {0: 1, 1: code}) == code
    assert agent._last_word(folder, {0: 1, 1: -9, 2: 4}) is None
    folder.write_halted(3, "loss is nan")
    assert agent._last_word(folder, {0: 2}) == 3, "the same on all nodes"


class Ranks:
    """What torchrun keeps of the ranks it started."""

    def close(self, _: signal.Signals, timeout: int) -> None:
        self.timeout = timeout


def alone(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An agent without torchrun behind it."""
    monkeypatch.setattr(agent.LocalElasticAgent, "_shutdown", lambda *_: None)
    made = object.__new__(agent.Agent)
    vars(made).update(_folder=folder, _codes={}, _pcontext=Ranks())
    monkeypatch.setattr(made, "_exit_codes", lambda: {0: 75})
    return made


def test_only_ranks_that_were_told_to_stop_get_the_time_for_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    made = alone(RunFolder(tmp_path), monkeypatch)
    ignored: list[int] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: ignored.append(number))
    made._shutdown(timeout=300)
    assert made._pcontext.timeout == agent.AFTER_FAILURE
    assert not ignored
    try:
        raise SignalException("told", signal.SIGTERM)
    except SignalException:
        made._shutdown(signal.SIGTERM)
    assert made._pcontext.timeout == 300
    assert made._codes == {0: 75}
    assert ignored == list(interrupt.heeded()), "a second one must not end the wait for a save"


class Left(BaseException):
    """In place of the end of the process."""


@pytest.mark.parametrize("hangs", [False, True])
def test_a_stuck_agent_leaves_whatever_its_explanation_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    made = alone(RunFolder(tmp_path), monkeypatch)
    made.GRACE = 1
    monkeypatch.setattr("time.sleep", lambda _: None)
    waits: list[int] = []

    def leave(code: int) -> None:
        raise Left(code)

    def explain(*_: object) -> int:
        if hangs:
            raise Left(*waits)
        raise OSError("the share is gone")

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(agent, "leave_later", waits.append)
    monkeypatch.setattr(agent, "_explain", explain)
    group = SimpleNamespace(state=agent.WorkerState.HEALTHY, workers=[0])
    vars(made).update(_worker_group=group, _remaining_restarts=0)
    with pytest.raises(Left) as left:
        made._leave_if_stuck()
    assert left.value.args == (75,)
    assert waits == [75], "a timer runs before anything is read"


@pytest.mark.parametrize(
    ("state", "restarts", "patience"),
    [("HEALTHY", 1, "GRACE"), ("FAILED", 0, "GRACE"), ("FAILED", 1, "REJOINING"), ("STOPPED", 0, "REJOINING"),
     ("SUCCEEDED", 0, "REJOINING")],
)  # fmt: skip
def test_an_agent_that_waits_for_the_others_gets_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, restarts: int, patience: str
) -> None:
    made = alone(RunFolder(tmp_path), monkeypatch)
    group = SimpleNamespace(state=agent.WorkerState[state], workers=[0])
    vars(made).update(_worker_group=group, _remaining_restarts=restarts)
    assert made._patience() == getattr(agent.Agent, patience)
    assert agent.Agent.REJOINING > 600 > 300 > agent.Agent.GRACE, (
        "torchrun's own limits: to join, and to leave together"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [(RendezvousTimeoutError(), "not all of them have come in time"),
     (RendezvousClosedError(), "one of them has ended it"),
     (RendezvousConnectionError("see inner exception"), "Connection refused")],
    ids=["late", "ended", "unreachable"],
)  # fmt: skip
def test_nodes_that_do_not_come_together_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    def run(_: object) -> None:
        raise error from ConnectionError("Connection refused")

    monkeypatch.setattr(agent, "run", run)
    monkeypatch.setattr(agent, "parse_args", lambda arguments: arguments)
    monkeypatch.setattr(agent, "_hush", lambda _: None)
    monkeypatch.setattr(agent.launcher, "LocalElasticAgent", None)
    monkeypatch.setenv(agent.AGENT, "")
    assert agent.main([str(tmp_path)]) == 1
    assert f"the nodes of this run have not come together: {said}" in capsys.readouterr().err
    RunFolder(tmp_path).interrupted.touch()
    assert agent.main([str(tmp_path)]) == 75, "the others have been told to stop"
