"""Steps that are profiled: which ones, what their traces hold, and that nothing else of the run knows of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch.profiler import record_function

from anchorformer.errors import UserError
from tests.train.cases import ALIGN, run_config
from tests.train.traces import ranges, read_trace
from train.choices import StageName
from train.compose import compose
from train.distributed import alone
from train.faults.interrupt import Interrupted
from train.faults.progress import Progress
from train.observe import trace
from train.observe.span import Span
from train.observe.trace import Tracer
from train.prepare import check_samples
from train.rehearse import shortened
from train.run.folder import RunFolder
from train.run.identity import numbers_digest
from train.sweep.points import config_hash
from train.trainer import Run


def run_of(folder: Path, profile: str | None, first: int = 0) -> Run:
    """As much of a run as a tracer looks at."""
    config = run_config(ALIGN, profile=profile, stage__max_steps=9)
    run = SimpleNamespace(config=config, folder=RunFolder(folder), world=alone(), first=first, progress=Progress())
    return cast(Run, run)


def take(
    run: Run, stop_in: int | None = None, fail_in: int | None = None, fail_behind: int | None = None
) -> None:  # fmt: skip
    """Steps of one addition each."""
    with Tracer(run) as tracer:
        for step in range(run.first + 1, 10):
            with tracer.step(step), record_function(f"taking {step}"):
                if step == stop_in:
                    raise Interrupted(step - 1, "SIGTERM")
                if step == fail_in:
                    raise ValueError("planted")
                torch.ones(2) + 1
            if step == fail_behind:
                raise ValueError("planted")


@pytest.mark.parametrize(
    "text", ["10", "step:", "step:0", "step:12-10", "step:1-", "steps:1", "step:-1", "step:1,2", ""]
)
def test_a_span_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="profile names no steps"):
        run_config(ALIGN, profile=text)


def test_a_span_on_the_command_line() -> None:
    words = ["stage=align", "data.root=/data"]
    assert compose([*words, "profile=step:10-12"]).profiled == Span(10, 12)
    assert compose([*words, "profile=step:10"]).profiled == Span(10, 10)
    assert compose(words).profiled is None
    with pytest.raises(UserError, match=r"steps from 1 to 11"):
        compose([*words, "stage.epochs=null", "stage.max_steps=11", "profile=step:10-12"])


@pytest.mark.parametrize(("profile", "total"), [("step:12", None), ("step:12-13", 12), ("step:13", 12)])
def test_a_span_beyond_the_run_is_refused_before_it_starts(
    make_run: Callable[..., RunFolder], profile: str, total: int | None
) -> None:
    """Two epochs of 24 samples in batches of 4 are 12 steps."""
    run = make_run("spans", ALIGN, stage__epochs=2.0, stage__max_steps=None)
    config = replace(run.read_config(), profile=profile)
    if total is None:
        check_samples(config, run.start)
        return
    with pytest.raises(UserError, match=f"steps from 1 to {total}"):
        check_samples(config, run.start)


def test_a_profile_is_no_part_of_what_a_run_is() -> None:
    config = run_config(ALIGN)
    profiled = replace(config, profile="step:2")
    assert numbers_digest(profiled) == numbers_digest(config)
    assert config_hash({StageName.align: profiled}) == config_hash({StageName.align: config})
    assert shortened(replace(config, profile="step:3")).profile is None, "a rehearsal has two steps"


@pytest.mark.parametrize(
    ("profile", "first", "steps"),
    [("step:1", 0, [1]), ("step:3-5", 0, [3, 4, 5]), ("step:9", 0, [9]), ("step:3-5", 4, [5]),
     ("step:3-5", 2, [3, 4, 5])],
)  # fmt: skip
def test_a_trace_holds_its_steps_and_no_other(tmp_path: Path, profile: str, first: int, steps: list[int]) -> None:
    take(run_of(tmp_path, profile, first))
    path = RunFolder(tmp_path).trace(steps[0], steps[-1], 0)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path], "and no draft is left"
    found = ranges(read_trace(path))
    assert found.keys() == {f"{name}{step}" for step in steps for name in ("ProfilerStep#", "taking ")}


@pytest.mark.parametrize(("profile", "first"), [(None, 0), ("step:3-5", 5)])
def test_nothing_is_traced_where_no_step_is_left(
    tmp_path: Path, profile: str | None, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        take(run_of(tmp_path, profile, first))
    assert not [*tmp_path.iterdir()]
    assert ("lies behind step 5" in caplog.text) == (profile is not None)


def test_an_interruption_leaves_the_steps_before_it(tmp_path: Path) -> None:
    for stop_in, last in ((3, None), (5, 4)):
        folder = tmp_path / str(stop_in)
        with pytest.raises(Interrupted):
            take(run_of(folder, "step:3-6"), stop_in=stop_in)
        assert list(folder.rglob("*.gz")) == ([RunFolder(folder).trace(3, last, 0)] if last else [])
        assert not torch.autograd._profiler_enabled()


@pytest.mark.parametrize("failure", [{"fail_in": 4}, {"fail_behind": 4}])
def test_a_failure_stops_the_profiler(tmp_path: Path, failure: dict[str, int]) -> None:
    """In a step or between two, as a checkpoint may; or the process would end by SIGSEGV, whatever it was to say."""
    with pytest.raises(ValueError, match="planted"):
        take(run_of(tmp_path, "step:3-6"), **failure)
    assert not torch.autograd._profiler_enabled()
    assert not [*tmp_path.rglob("*.gz")]


def test_a_full_disk_costs_the_trace_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The profiler itself says nothing of it."""
    monkeypatch.setattr(trace.profile, "export_chrome_trace", lambda _, path: Path(path).write_text('{"traceEv'))
    take(run_of(tmp_path, "step:3-4"))
    assert "the trace of step 3-4 could not be written" in caplog.text
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
