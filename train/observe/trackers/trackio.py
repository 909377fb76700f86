"""Trackio: all runs in one SQLite file on this machine, and the dashboard that shows it on loopback."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

from train.observe.trackers.base import Picture, Subject, TrackerConfig, read_notes, write_notes

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class TrackioConfig(TrackerConfig):
    """A run of Trackio; its id is kept in the run's folder, its curves beside those of other runs."""

    folder: str = ".cache/trackio"
    """Where the database lies; it can be deleted, since `python -m train sync` makes it anew from the runs."""

    package: ClassVar[str | None] = "trackio"
    extra: ClassVar[str] = "dashboard"

    @contextmanager
    def open(self, subject: Subject) -> Iterator[TrackioRun]:
        """
        Raises:
            Exception: whatever trackio raises.
        """
        trackio = self._import()
        path = subject.folder / "trackio.json"
        records = {record["id"]: record["name"] for record in trackio.SQLiteStorage.get_run_records(self.project)}
        known = records.get(read_notes(path).get("id"))
        name = known or self.name or subject.name
        if known is None and name in records.values():
            # Another run had the name: one that was deleted, or one of another output_root.
            name = f"{name} {secrets.token_hex(2)}"
        with redirect_stdout(StringIO()):  # its own greeting, which would hide what the caller says
            run = trackio.init(
                project=self.project, name=name, group=self.group, config=dict(subject.config),
                resume="never" if known is None else "must", embed=False, auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        # The database itself says how far it goes, also where an earlier feeding was cut short.
        shown = trackio.SQLiteStorage.get_max_step_for_run(self.project, name) if known else None
        write_notes(path, {"id": run.id, "name": name})
        try:
            yield TrackioRun(trackio, run, shown or 0)
        finally:
            with redirect_stdout(StringIO()):
                trackio.finish()

    def serve(self) -> str:
        """Starts the dashboard in the background of this process.

        Returns:
            Its address, on loopback.
        """
        trackio = self._import()
        with redirect_stdout(StringIO()):  # which says the token that lets a visitor delete runs
            _, url, *_ = trackio.show(
                project=self.project, open_browser=False, block_thread=False, host=LOOPBACK, share=False, footer=False
            )
        return str(url)

    def _import(self) -> Any:
        folder = Path(self.folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        # Read when the package is imported; nothing is ever fetched from a hub.
        os.environ |= {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
        import trackio

        return trackio


class TrackioRun:
    """One session of a run."""

    def __init__(self, trackio: Any, run: Any, shown: int) -> None:
        self._trackio, self._run, self.shown = trackio, run, shown

    def log(self, step: int, values: Mapping[str, float], pictures: Sequence[Picture]) -> None:
        images = {one.name: self._trackio.Image(str(one.path), caption=one.caption) for one in pictures}
        self._run.log({**values, **images}, step=step)
        self.shown = step
