"""Weights & Biases: offline files in the run's folder, or the service where it is asked for and a key is there."""

from __future__ import annotations

import netrc
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from anchorformer.errors import UserError
from train.observe.trackers.base import Picture, Subject, TrackerConfig, read_notes, write_notes

HOST = "https://api.wandb.ai"


class Mode(str, Enum):
    offline = "offline"
    """Files only; not one connection is attempted."""
    online = "online"


@dataclass(frozen=True, kw_only=True)
class WandbConfig(TrackerConfig):
    """A run of Weights & Biases with an id that the run's folder keeps."""

    mode: Mode = Mode.offline
    entity: str | None = None
    """User or team; null is the key's own."""

    package: ClassVar[str | None] = "wandb"

    def check(self) -> None:
        """
        Raises:
            UserError: wandb is not installed; or it is to be online, and there is no key.
        """
        super().check()
        if self.mode is Mode.online and not _has_key():
            raise UserError(
                "tracker.mode=online needs a key", found="no WANDB_API_KEY, and no line of its host in ~/.netrc",
                expected="one of them", remedy="run `wandb login`, or leave tracker.mode at offline and feed the "
                "service later: python -m train sync RUN tracker=wandb tracker.mode=online",
            )  # fmt: skip

    @contextmanager
    def open(self, subject: Subject) -> Iterator[WandbRun]:
        """
        Raises:
            Exception: whatever wandb raises.
        """
        # Of this process and of those that it starts: whoever feeds runs gives each a process of its own.
        if self.mode is Mode.offline:
            # Its own reports of crashes go out in spite of offline; a key has no business where nothing is uploaded.
            os.environ |= {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
            os.environ.pop("WANDB_API_KEY", None)
        else:
            os.environ["WANDB_MODE"] = "online"
        run = WandbRun(self, subject)
        yield run
        run.finish()


class WandbRun:
    """A run of Weights & Biases, from where it was left.

    Offline every feeding is a session, a folder of its own; one that did not come to its end is thrown away and logged
    again, so that the sessions of an entity and project together hold each step once. Online the service says how far
    the run goes.
    """

    def __init__(self, config: WandbConfig, subject: Subject) -> None:
        self._config, self._subject = config, subject
        self._path = subject.folder / "wandb.json"
        self._notes: dict[str, Any] = {
            "id": secrets.token_hex(4),
            "shown": {},
            "sessions": [],
            **read_notes(self._path),
        }
        self._target = f"{config.entity or ''}/{config.project}"
        write_notes(self._path, self._notes)
        self._wandb: Any = None
        self._run: Any = None
        if config.mode is Mode.offline:
            for folder in self._sessions():
                if folder.name not in self._notes["sessions"]:
                    shutil.rmtree(folder)
            self.shown = int(self._notes["shown"].get(self._target, 0))
        else:
            self._run = self._start()
            self.shown = int(self._run.step) - 1

    def log(self, step: int, values: Mapping[str, float], pictures: Sequence[Picture]) -> None:
        """Adds a step."""
        if self._run is None:  # only now, or a session without steps would be left behind
            self._run = self._start()
        images = {one.name: self._wandb.Image(str(one.path), caption=one.caption) for one in pictures}
        self._run.log({**values, **images}, step=step)
        self.shown = step

    def finish(self) -> None:
        """Returns when everything is written, or uploaded."""
        if self._run is None:
            return
        self._run.finish()
        if self._config.mode is Mode.offline:
            sessions = [folder.name for folder in self._sessions()]
            shown = self._notes["shown"] | {self._target: self.shown}
            write_notes(self._path, self._notes | {"shown": shown, "sessions": sessions})

    def _start(self) -> Any:
        import wandb

        config, subject = self._config, self._subject
        # No host, no command line, no environment, no code: the folder has what is needed, with secrets masked.
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, disable_job_creation=True,
            x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True,
        )  # fmt: skip
        self._wandb = wandb
        return wandb.init(
            project=config.project, entity=config.entity, group=config.group, name=config.name or subject.name,
            id=self._notes["id"], resume="allow", mode=config.mode.value, dir=str(subject.folder),
            config=dict(subject.config), settings=settings,
        )  # fmt: skip

    def _sessions(self) -> list[Path]:
        """The offline folders of the run, oldest first."""
        return sorted((self._subject.folder / "wandb").glob(f"offline-run-*-{self._notes['id']}"))


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", HOST)).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
