"""Trackio: all runs in one SQLite file on this machine, and the dashboard that shows it on loopback."""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

from anchorformer.errors import UserError
from train.observe.trackers.base import Picture, Subject, TrackerConfig, read_notes, write_notes

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class TrackioConfig(TrackerConfig):
    """A run of Trackio; its id is kept in the run's folder, its curves beside those of other runs.

    The id is the same in every database, those of other folders and projects too, and each says itself what it has: so
    feeding one takes nothing away from another.
    """

    folder: str = ".cache/trackio"
    """Where the database lies; it can be deleted, since `python -m train sync` makes it anew from the runs."""

    package: ClassVar[str | None] = "trackio"
    extra: ClassVar[str] = "dashboard"

    @contextmanager
    def open(self, subject: Subject) -> Iterator[TrackioRun]:
        """
        Raises:
            UserError: this process has another database open.
            sqlite3.Error: the database cannot be read, or has not taken all steps.
            Exception: whatever else trackio raises.
        """
        trackio = self._import()
        path = subject.folder / "trackio.json"
        notes = {"id": secrets.token_hex(16), **read_notes(path)}
        write_notes(path, notes)
        records = {record["id"]: record["name"] for record in trackio.SQLiteStorage.get_run_records(self.project)}
        known = records.get(notes["id"])
        name = known or self.name or subject.name
        if known is None and name in records.values():
            # Another run had the name: one that was deleted, or one of another output_root.
            name = f"{name} {secrets.token_hex(2)}"
        with redirect_stdout(StringIO()):  # its own greeting, which would hide what the caller says
            run = trackio.init(
                project=self.project, name=name, group=self.group, config=dict(subject.config),
                resume="never" if known is None else "must", embed=False, auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        run.id = notes["id"]  # nothing has gone out under the one that trackio has made up

        def kept() -> int:
            """The database itself says how far it goes, also where an earlier feeding was cut short."""
            return trackio.SQLiteStorage.get_max_step_for_run(self.project, name, run_id=run.id) or 0

        session = TrackioRun(trackio, run, kept())
        try:
            yield session
        finally:
            with redirect_stdout(StringIO()):
                trackio.finish()
        # Of a database that is locked, trackio says nothing but a warning.
        if (last := kept()) < session.shown:
            raise sqlite3.OperationalError(f"{self.folder} has kept no step of {name} after {last}")

    def serve(self) -> str:
        """Starts the dashboard in the background of this process.

        Returns:
            Its address, on loopback.
        """
        trackio = self._import()
        with redirect_stdout(StringIO()):  # which says the token that lets a visitor delete runs
            # Of no project: the page then offers all that are there.
            _, url, *_ = trackio.show(
                open_browser=False, block_thread=False, host=LOOPBACK, share=False, footer=False
            )  # fmt: skip
        return str(url)

    def _import(self) -> Any:
        folder = Path(self.folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        # Read when the package is imported, once for the process; nothing is ever fetched from a hub.
        os.environ |= {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
        import trackio

        if folder != trackio.TRACKIO_DIR:
            raise UserError(
                "a process has one database of Trackio", found=f"{folder} behind {trackio.TRACKIO_DIR}",
                expected="one tracker.folder", remedy="feed each in a process of its own, as python -m train sync does",
            )  # fmt: skip
        return trackio


class TrackioRun:
    """One session of a run."""

    def __init__(self, trackio: Any, run: Any, shown: int) -> None:
        self._trackio, self._run, self.shown = trackio, run, shown

    def log(self, step: int, values: Mapping[str, float], pictures: Sequence[Picture]) -> None:
        images = {one.name: self._trackio.Image(str(one.path), caption=one.caption) for one in pictures}
        self._run.log({**values, **images}, step=step)
        self.shown = step
