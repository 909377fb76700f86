"""The report: right figures from a run's files, and plain words where there are none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from anchorformer.errors import UserError
from evals import report


def write_stage(folder: Path, losses: list[float], evals: dict[str, dict[str, float]] | None = None) -> None:
    (folder / "evals").mkdir(parents=True)
    rows = [
        {"step": step, "loss": loss, "tokens": 200, "samples": 4, "time": {"seconds": 0.5}}
        for step, loss in enumerate(losses, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "lo')
    (folder / "environment.json").write_text(
        json.dumps({"host": "here", "python": "3.11", "commit": "abc", "versions": {"torch": "2"}})
    )
    for task, scores in (evals or {}).items():
        for condition, score in scores.items():
            result: dict[str, Any] = {
                "task": task, "condition": condition, "metric": "exact_match", "n_scored": 100, "score": score,
                "time": {"seconds": 1.5}, "machine": "2 cores of a test",
            }  # fmt: skip
            (folder / "evals" / f"{task}-{condition}.json").write_text(json.dumps(result))


def cells(text: str, first: str) -> list[str]:
    rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines())
    return next(row for row in rows if row[0] == first)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    write_stage(folder / "finetune", [2.0] * 10 + [1.0] * 5 + [0.5] * 10, {
        "scene": {"right": 0.58, "shuffled": 0.30, "none": 0.25}, "doc": {"right": 0.75},
    })  # fmt: skip
    write_stage(folder / "align", [4.0] * 10 + [0.8] * 10)
    return folder


def test_stages_in_the_order_they_were_trained(run: Path) -> None:
    text = report.report(run)
    assert text.index("| align") < text.index("| finetune")
    assert cells(text, "align")[:7] == ["align", "20", "4.000", "0.800", "400", "8.0", "10.0"]
    assert text.splitlines()[0] == "# demo"
    assert "Trained on here: Python 3.11, torch 2; commit abc." in text
    assert "Evaluated on 2 cores of a test." in text


def test_accuracy_beside_its_baselines(run: Path) -> None:
    text = report.report(run)
    rows = {
        line.split("|")[2].strip(): [cell.strip() for cell in line.split("|")]
        for line in text.splitlines()
        if "exact_match" in line
    }
    assert rows["scene"][1:9] == ["finetune", "scene", "exact_match", "100", "0.580", "0.300", "0.250", "+0.280"]
    assert rows["doc"][5:9] == ["0.750", "", "", ""]


def test_seconds_of_every_part_and_their_sum(run: Path, tmp_path: Path) -> None:
    (tmp_path / "installed").write_text(json.dumps({"seconds": 100}))
    (tmp_path / "world.json").write_text(json.dumps({"seconds": {"clip": 150.5, "llama": 49.5}, "other": 1}))
    timings = report.read_timings([f"install={tmp_path}/installed", f"mini world={tmp_path}/world.json"])
    text = report.report(run, timings)
    assert cells(text, "install") == ["install", "100.0"]
    assert cells(text, "mini world: clip") == ["mini world: clip", "150.5"]
    assert cells(text, "evaluation after finetune") == ["evaluation after finetune", "6.0"]
    assert cells(text, "sum") == ["sum", f"{100 + 200 + 10 + 12.5 + 6:.1f}"]


def test_a_file_without_seconds_is_named(run: Path) -> None:
    with pytest.raises(UserError, match="no `seconds` in it"):
        report.read_timings([f"install={run}/align/environment.json"])
    with pytest.raises(UserError, match="PART=FILE"):
        report.read_timings(["install"])


def test_a_single_stage_is_a_report_too(run: Path) -> None:
    assert report.report(run / "align").startswith("# align")
    assert "No task has been evaluated" in report.report(run / "align")


def test_the_command_prints_what_it_writes(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "installed").write_text('{"seconds": 3}')
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--seconds", f"install={run}/installed"])
    assert report.main() == 0
    assert (run / "report.md").read_text() in capsys.readouterr().out
    assert not list(run.glob("*.tmp"))


def test_seconds_that_were_told_once_are_remembered(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "installed").write_text('{"seconds": 3}')
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--seconds", f"install={run}/installed"])
    report.main()
    first = (run / "report.md").read_text()
    (run / "installed").unlink()
    monkeypatch.setattr(sys, "argv", ["report", str(run)])
    report.main()
    assert (run / "report.md").read_text() == first
    assert cells(first, "install") == ["install", "3.0"]


def test_a_loss_gains_by_being_lower(run: Path) -> None:
    for condition, score in (("right", 1.2), ("shuffled", 1.5)):
        path = run / "align" / "evals" / f"caption-{condition}.json"
        path.write_text(json.dumps({
            "task": "caption", "condition": condition, "metric": "loss_per_token", "n_scored": 100, "score": score,
            "time": {"seconds": 1.5}, "machine": "2 cores of a test",
        }))  # fmt: skip
    text = report.report(run)
    row = next(line for line in text.splitlines() if "loss_per_token" in line)
    assert [cell.strip() for cell in row.split("|")][5:9] == ["1.200", "1.500", "", "+0.300"]
    assert "for a loss, which is better when lower, shuffled - right" in text


def test_a_part_of_a_task_has_a_row_of_its_own(run: Path) -> None:
    full = run / "finetune" / "evals" / "doc-right.json"
    part = {**json.loads(full.read_text()), "limit": 8, "n_scored": 8, "score": 0.5}
    full.with_name("doc-right-limit8.json").write_text(json.dumps(part))
    rows = [[cell.strip() for cell in line.split("|")] for line in report.report(run).splitlines() if "| doc" in line]
    assert [row[2:6] for row in rows] == [
        ["doc", "exact_match", "100", "0.750"], ["doc (limit 8)", "exact_match", "8", "0.500"],
    ]  # fmt: skip


def test_the_folder_of_runs_names_them(run: Path) -> None:
    write_stage(run.parent / "other" / "align", [1.0])
    with pytest.raises(UserError) as caught:
        report.report(run.parent)
    assert caught.value.remedy == f"pass one of {run}, {run.parent}/other"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to report"):
        report.report(tmp_path)


@pytest.mark.parametrize("content", ["", "{}x\n", "\n"])
def test_a_damaged_metrics_file_is_named(run: Path, content: str) -> None:
    (run / "align" / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"align/metrics\.jsonl cannot be read"):
        report.report(run)
