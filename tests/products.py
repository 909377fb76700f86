"""How the product tests start the launch scripts and read what a run left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCENE, CHART, DOC = "miniworld_scene", "miniworld_chart", "miniworld_doc"


def launch(script: str, *arguments: str) -> str:
    """Runs a script of launch/ as a user would and returns what it printed; a failure shows its end."""
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "launch" / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


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
