"""The benchmark of eight cards on two CPU ranks at toy shapes: that it runs to its table, not what the table says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny_world import write_world

SCRIPT = Path(__file__).parents[2] / "launch" / "bench_8gpu.sh"


def bench(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, **settings}
    return subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, env=env, cwd="/", timeout=900)


def test_thirty_steps_of_both_stages_under_both_zeros_on_eight_cards() -> None:
    done = bench("--dry-run", "data.root=/data")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--nproc-per-node=8") == 4
    assert done.stdout.count("max_steps: 30") == 4
    assert "init_from: checkpoints/bench-align-zero3" in done.stdout
    assert "--warm-up 5 --json bench/results/8gpu.json" in done.stdout


@pytest.mark.slow
def test_two_ranks_at_toy_shapes(tiny_backbones: Path, tmp_path: Path) -> None:
    words = [word for word in write_world(tmp_path, tiny_backbones) if word != "stage=align"]
    out = tmp_path / "8gpu.json"
    settings = {"STEPS": "4", "WARM_UP": "1", "OUT": str(out)}
    done = bench("experiment=miniworld", "stage.global_batch=4", *words, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert [row["run"] for row in rows] == [
        "bench-align-zero2", "bench-finetune-zero2", "bench-align-zero3", "bench-finetune-zero3",
    ]  # fmt: skip
    assert all(row["steps"] == 3 and row["step_s"] > 0 and row["samples_s"] > 0 for row in rows)
