"""The README's first command at its smallest budget: world, backbones, two stages on two ranks, answers, report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.products import CHART, DOC, SCENE, launch, margins, steps

pytestmark = pytest.mark.beside("smoke")


def test_both_stages_are_done_and_learned(runs: Path) -> None:
    for stage in ("align", "finetune"):
        assert (runs / stage / "DONE").exists()
        losses = [step["loss"] for step in steps(runs / stage)]
        assert sum(losses[-5:]) < sum(losses[:5])


def test_the_model_reads_its_images(runs: Path) -> None:
    found = margins(runs)
    # An eighth of the finetuning of `make train` and 200 questions per task: the bounds are far below what a run gives
    # (caption 1.65, scene .15, chart .23, doc .145 with seed 0) and above what chance does.
    assert found["miniworld_caption"] >= 0.5, found
    assert found[SCENE] > 0.05, found
    assert found[CHART] > 0.05, found
    assert found[DOC] > 0.03, found


def test_the_report_says_it_all(runs: Path) -> None:
    report = (runs / "report.md").read_text()
    for part in ("align", "finetune", SCENE, CHART, DOC, "shuffled image", "no image", "tokens/s", "Seconds per part",
                 "mini world"):  # fmt: skip
        assert part in report


def test_a_second_call_trains_nothing_again(runs: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.jsonl")}
    launch("two_stage.sh", "smoke", "experiment=smoke", f"output_root={runs.parent}")
    assert before == {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.jsonl")}
