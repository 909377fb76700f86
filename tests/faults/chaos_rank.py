"""A rank that is killed wherever a schedule says so: `chaos_rank.py SCHEDULE RUN_FOLDER`, once for every line of it."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from train import rank, trainer
from train.checkpoint import retention
from train.faults.progress import Phase, Progress

START_UP = (Phase.reading.name, Phase.loading.name, Phase.starting.name)
IN_STEPS = (Phase.data.name, Phase.exchange.name, Phase.compute.name, Phase.update.name)
WRITTEN, RENAMED = "written", "renamed"
"""Inside of a save: behind the engine's files; behind the rename, before `latest` names it (rank 0 only)."""
PRUNING = "pruning"
"""In the middle of retention: an old checkpoint has lost its name and not its files (rank 0 only)."""
IN_SAVE = (Phase.save.name, WRITTEN, RENAMED)
BEHIND_COMPLETE = (RENAMED, PRUNING)
AT_END = Phase.export.name


class Schedule:
    """Kills by place, one after the other, each of which happens once, however often the ranks are started."""

    def __init__(self, path: Path, rank: int) -> None:
        self._path, self._rank = path, rank
        self._kills: list[dict[str, Any]] = json.loads(path.read_text())

    def reach(self, point: str, step: int) -> None:
        """Call at every place; does not return from one that is due."""
        for number, kill in enumerate(self._kills):
            done = self._path.with_name(f"{self._path.stem}-{number:03d}.done")
            if done.exists():
                continue
            if (kill["rank"], kill["point"], kill["step"]) == (self._rank, point, step):
                done.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return


def plant(schedule: Schedule, starts: Path) -> None:
    """Puts the places into the process, and a line into `starts` for every start."""
    save: Any = importlib.import_module("train.checkpoint.save")  # the package has a function of that name
    enter, fingerprint, sync, train = Progress.enter, save.fingerprint, save.sync_folder, trainer.train
    rmtree = shutil.rmtree
    now = {"step": 0}

    def entered(progress: Progress, phase: Phase, step: int | None = None, samples: Any = None) -> None:
        enter(progress, phase, step, samples)
        now["step"] = progress.place.step
        schedule.reach(phase.name, progress.place.step)

    def written(pieces: Any) -> Any:
        schedule.reach(WRITTEN, now["step"])
        return fingerprint(pieces)

    def synced(folder: Path) -> None:
        schedule.reach(RENAMED, now["step"])
        sync(folder)

    def removed(path: Path, *arguments: Any, **named: Any) -> None:
        if Path(path).name.startswith(retention.TRASH) and Path(path).exists():
            schedule.reach(PRUNING, now["step"])
        rmtree(path, *arguments, **named)

    def started(run: trainer.Run) -> None:
        if run.world.is_main:
            with starts.open("a") as file:
                file.write(f"{run.first}\n")
        train(run)

    Progress.enter = entered  # type: ignore[method-assign,assignment]
    save.fingerprint = written
    save.sync_folder = synced
    shutil.rmtree = removed
    rank.train = started  # type: ignore[attr-defined]


if __name__ == "__main__":
    path, folder = Path(sys.argv[1]), sys.argv[2]
    plant(Schedule(path, int(os.environ["RANK"])), path.with_suffix(".starts"))
    rank.run([folder])
