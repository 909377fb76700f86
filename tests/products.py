"""How tests start the launch scripts and what runs beside them, and read what a run left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCENE, CHART, DOC = "miniworld_scene", "miniworld_chart", "miniworld_doc"


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable}


def launch(script: str, *arguments: str) -> str:
    """Runs a script of launch/ as a user would and returns what it printed; a failure shows its end."""
    command = [str(ROOT / "launch" / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


class Beside:
    """What takes minutes in processes of its own, and is at work beside the tests.

    `smoke` and `train` are launch/miniworld.sh with that budget, and leave the tests the first say on the machine's
    cores; `loopback` is a second session, of the faults that need neither root nor another host.
    """

    def __init__(self, what: str) -> None:
        self._what, self._folder = what, tempfile.TemporaryDirectory(prefix=f"beside-{what}-")
        self._log = Path(self._folder.name) / "log.txt"
        command = ["nice", str(ROOT / "launch" / "miniworld.sh"), what, f"output_root={self._folder.name}"]
        if what == "loopback":
            command = [sys.executable, "-m", "pytest", "-m", "faults and loopback", "-p", "no:cacheprovider"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=log, stderr=log)

    def said(self) -> str:
        """Everything that it printed, once it has ended; a failure shows the end of that."""
        code = self._process.wait()
        log = self._log.read_text()
        assert code == 0, f"{self._what} ended with {code}\n{log[-8000:]}"
        return log

    def runs(self) -> Path:
        """The folder of the two runs of launch/miniworld.sh, once it has ended."""
        self.said()
        return next(path.parent for path in Path(self._folder.name).glob("*/finetune"))

    def end(self) -> None:
        """Stops what is still at work, and leaves nothing behind."""
        # A session of tests clears away what it has started when it is interrupted, not when it is told to end.
        self._process.send_signal(signal.SIGINT if self._what == "loopback" else signal.SIGTERM)
        self._process.wait()
        self._folder.cleanup()


def steps(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def score(run: Path, task: str, condition: str) -> float:
    """What an evaluation scored under a condition (right, shuffled or none)."""
    return float(json.loads((run / "evals" / f"{task}-{condition}.json").read_text())["score"])


def margins(runs: Path) -> dict[str, float]:
    """Right minus shuffled images per task, and wrong minus right caption loss."""
    tasks = {task: score(runs / "finetune", task, "right") - score(runs / "finetune", task, "shuffled")
             for task in (SCENE, CHART, DOC)}  # fmt: skip
    caption = "miniworld_caption"
    return tasks | {caption: score(runs / "align", caption, "shuffled") - score(runs / "align", caption, "right")}
