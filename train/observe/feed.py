"""From a run's files to a tracker: which steps are complete, what is shown of each, and each of them once."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from anchorformer.schema import to_plain
from train.observe.journal import MEDIA, Tail
from train.observe.trackers.base import Picture, Subject, TrackerConfig
from train.run.folder import RunFolder

PERIOD = 2.0
"""Seconds between two looks at the files of a run that goes on."""
NO_CURVES = {"step", "n", "n_scored"}
"""Numbers of a record that say nothing over time."""


def feed(folder: RunFolder, tracker: TrackerConfig, is_over: threading.Event) -> int:
    """Shows every complete step that the tracker does not have, until the run is over.

    The line of metrics.jsonl is the last that is written of a step, so that one that has it is complete in all files.

    Args:
        is_over: set once nothing more is written; what lies there by then is still shown.

    Returns:
        How many steps were shown.

    Raises:
        BusyError: another process feeds this run.
        Exception: whatever the tracker raises.
    """
    config = folder.read_config()
    subject = Subject(config.run, to_plain(config), folder.tracker)
    with ExitStack() as stack:
        stack.enter_context(_held(folder))
        shown = stack.enter_context(tracker.open(subject))
        steps = stack.enter_context(closing(_Steps(folder)))
        count = 0
        while True:
            is_last = is_over.wait(PERIOD)
            for step, values in steps.take():
                if step > shown.shown:
                    shown.log(step, values, list(pictures(folder.media / MEDIA.format(step))))
                    count += 1
            if is_last:
                return count


class BusyError(Exception):
    """Another process feeds this run already, the one that the message names."""


class _Steps:
    """The steps that a run has completed since they were last asked for."""

    def __init__(self, folder: RunFolder) -> None:
        self._metrics = Tail(folder.metrics)
        self._others = {"health": Tail(folder.health), "eval": Tail(folder.evals)}
        self._found: defaultdict[int, dict[str, float]] = defaultdict(dict)

    def take(self) -> Iterator[tuple[int, dict[str, float]]]:
        records = list(self._metrics.take())
        # Read behind the metrics, which are written behind them.
        for prefix, tail in self._others.items():
            for record in tail.take():
                self._found[record["step"]] |= curves(prefix, record)
        for record in records:
            yield record["step"], curves("train", record) | self._found.pop(record["step"], {})

    def close(self) -> None:
        for tail in (self._metrics, *self._others.values()):
            tail.close()


def curves(prefix: str, record: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a record that can change, under a name with slashes; a validation's under its dataset or task."""
    name = record.get("dataset", record.get("task"))
    return dict(_numbers(f"{prefix}/{name}" if name else prefix, record))


def _numbers(path: str, value: object) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key in value.keys() - NO_CURVES:
            yield from _numbers(f"{path}/{key}", value[key])
    elif isinstance(value, int | float):
        yield path, float(value)


def pictures(folder: Path) -> Iterator[Picture]:
    """The overlays of one look at the fixed images; none where there was no look."""
    answers = folder / "answers.json"
    if not answers.is_file():
        return
    for number, one in enumerate(json.loads(answers.read_text())):
        caption = f"{one['question']}\n{one['answer']} (right: {' / '.join(one['references'])})"
        for index, overlay in enumerate(one["overlays"]):
            yield Picture(f"anchors/{number}-{index}", folder / overlay, caption)


@contextmanager
def _held(folder: RunFolder) -> Iterator[None]:
    """Keeps every other process on this machine from feeding the run; the system lets go when the process ends."""
    folder.tracker.mkdir(exist_ok=True)
    with (folder.tracker / "LOCK").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BusyError(file.read()) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
