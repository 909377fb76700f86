"""A torch.profiler trace of the steps that `profile` names, one file per rank; nothing of it where none are named."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from torch.profiler import ProfilerActivity, profile, record_function

from data.arrow import written_whole
from train.faults.interrupt import Interrupted
from train.faults.progress import Phase
from train.observe.span import Span

if TYPE_CHECKING:
    from train.trainer import Run

log = logging.getLogger(__name__)


class Tracer:
    """Around each step of a rank: starts the profiler, names the step, stops, and writes what there is.

    The profiler only watches, so that the steps have the same numbers. A resumed run traces the steps that it still
    has to take.
    """

    def __init__(self, run: Run) -> None:
        span = run.config.profiled
        self._run = run
        self._steps = range(0) if span is None else range(max(span.first, run.first + 1), span.last + 1)
        if span is not None and not self._steps:
            log.info("profile=step:%s lies behind step %d, from which the run goes on: nothing is traced",
                     span, run.first)  # fmt: skip
        self._profiler: profile | None = None
        self._is_running = False

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_: object) -> None:
        """Gives up a trace that is not finished: in or between its steps something else has ended the run."""
        if self._profiler is not None and self._is_running:
            # A process that ends while it is being profiled ends with SIGSEGV. A card that has failed may refuse; what
            # it has failed with is the error to be seen.
            with suppress(RuntimeError):
                self._profiler.stop_trace()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """The block that takes a step; an interruption leaves the trace of the steps before it."""
        if step in (self._steps.start - 1, self._steps.start) and self._steps and self._profiler is None:
            self._profiler = self._prepared()
        if self._profiler is None or step not in self._steps:
            yield
            return
        if step == self._steps.start:
            self._profiler.start_trace()
            self._is_running = True
        try:
            # The name by which tools that compare traces find the steps in them.
            with record_function(f"ProfilerStep#{step}"):
                yield
        except Interrupted:
            self._stop(step - 1)
            raise
        if step == self._steps[-1]:
            self._stop(step)

    def _prepared(self) -> profile:
        """A profiler that starts at once: on CUDA the first start takes long, which the step before it pays."""
        is_cuda = self._run.world.device.type == "cuda"
        profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])])
        profiler.prepare_trace()
        return profiler

    def _stop(self, last: int) -> None:
        assert self._profiler is not None
        self._profiler.stop_trace()
        self._is_running = False
        if last >= self._steps.start:
            self._run.progress.enter(Phase.trace)
            taken = Span(self._steps.start, last)
            path = self._run.folder.trace(taken.first, taken.last, self._run.world.rank)
            try:
                write(self._profiler, path)
            except OSError as error:
                # Days of training are not given up for a trace.
                log.error("the trace of step %s could not be written, and the run goes on without it: %s", taken, error)
            else:
                log.info("the trace of step %s is %s, and those of other ranks are beside it; ui.perfetto.dev opens "
                         "them", taken, path)  # fmt: skip
        self._profiler = None
        self._steps = range(0)


def write(profiler: profile, path: Path) -> None:
    """Writes a trace that has been stopped, as Chrome's JSON under gzip.

    Raises:
        OSError: no room or no permission.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as draft, NamedTemporaryFile(dir=path.parent, prefix=".tmp-", suffix=".json") as plain:
        profiler.export_chrome_trace(plain.name)
        _check_end(Path(plain.name))
        with Path(plain.name).open("rb") as source, gzip.open(draft, "wb") as target:
            shutil.copyfileobj(source, target)


def _check_end(path: Path) -> None:
    """The profiler says nothing where the disk refuses what it writes."""
    with path.open("rb") as file:
        file.seek(-min(16, path.stat().st_size), os.SEEK_END)
        if not file.read().rstrip().endswith(b"}"):
            raise OSError(f"{path} is cut short; {shutil.disk_usage(path.parent).free} bytes free")
