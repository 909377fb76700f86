"""What two real ranks leave in one folder about themselves: logs, memory, what they talk over, traces."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable

import pytest

from tests.train.cases import FINETUNE
from tests.train.traces import ranges, read_trace
from train.compose import ROOT
from train.run.folder import RunFolder
from train.start import Topology, command, environment


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_tell_of_themselves(make_run: Callable[..., RunFolder], zero: int) -> None:
    run = make_run(
        "pair", FINETUNE, stage__max_steps=4, engine="deepspeed", zero__stage=zero, hardware__ranks=2,
        hardware__micro_batch=1, log__every=3, profile="step:2-3",
    )  # fmt: skip
    config = run.read_config()
    given = environment(config, {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "NCCL_ALGO": "Ring", "NCCL_TOKEN": "s3cret"})
    done = subprocess.run(
        command(run.path, config, Topology()), env=given, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

    times = [json.loads(line)["time"] for line in run.metrics.read_text().splitlines()]
    assert ["ranks" in time for time in times] == [False, False, True, True], "the third and the last"
    for time in times:
        assert time["tokens_per_second"] > 0
        assert time["fullest_rank"] in (0, 1)
    for time in times[2:]:
        assert {name: len(values) for name, values in time["ranks"].items()} == {"own_seconds": 2, "host_gib": 2}
        assert min(time["ranks"]["host_gib"]) > 0.1, "torch alone is more"
        assert max(time["ranks"]["own_seconds"]) == time["own_seconds_max"]
    assert " tok/s" in done.stdout

    told = json.loads(run.communication.read_text())
    assert sorted(number for one in told["ranks"] for number in one["ranks"]) == [0, 1]
    for one in told["ranks"]:
        assert one["interfaces"] == {"lo": ["127.0.0.1"]}
        asked = {name: one["variables"][name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_ALGO", "NCCL_TOKEN")}
        assert asked == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_ALGO": "Ring", "NCCL_TOKEN": "***"}
        assert {group["backend"] for group in one["groups"]} == {"gloo"}
        assert {group["timeout_seconds"] for group in one["groups"]} == {config.watchdog.collective_seconds}

    for number in range(2):
        text = run.log(number).read_text()
        assert "process groups gloo (default_pg)" in text
        assert "GLOO_SOCKET_IFNAME=lo" in text
        assert "s3cret" not in text
        path = run.trace(2, 3, number)
        assert f"the trace of step 2-3 is {path}" in text
        found = ranges(read_trace(path))
        assert [name for name in found if name.startswith("ProfilerStep")] == ["ProfilerStep#2", "ProfilerStep#3"]
        steps = [found[f"ProfilerStep#{step}"][0] for step in (2, 3)]
        # Four samples, one in a micro-batch, two ranks: two micro-batches of each in a step.
        for name, times_of_a_step in (("data", 1), ("exchange", 1), ("forward", 2), ("backward", 2), ("step", 1)):
            inside = [[begin <= at and end >= until for at, until in found[name]].count(True) for begin, end in steps]
            assert inside == [times_of_a_step] * 2, name
            assert len(found[name]) == 2 * times_of_a_step, "and none outside of the steps"
    assert str(run.trace(2, 3, 0)) in done.stdout
