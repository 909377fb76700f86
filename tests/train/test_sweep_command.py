"""What the command of a sweep leaves and ends with, on fake commands: its summary, its words and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.evals.runs_on_disk import write_result
from tests.train.fake_trials import python, slots
from train.choices import StageName
from train.compose import ROOT
from train.sweep import summary
from train.sweep.points import Plan, Point
from train.sweep.trial import State, Trial, TrialFolder
from train.sweep.words import read
from train.verbs import sweep as verb
from train.verbs.sweep import main

END = "import sys; print('planted'); sys.exit(int(sys.argv[1]))"


def planned(folder: Path, *codes: int) -> Plan:
    """A trial for each code, which its only command ends with."""
    made = Plan(folder, [], {}, {})
    for place, code in enumerate(codes):
        name, point = f"t{place}", {"place": place, "seed": 0}
        made.points.append(Point("codes", point, name))
        made.trials[folder / "trials" / name] = Trial(
            id=name, point=point, overrides=(), config_hash=name, steps=(python("end", END, code),),
            runs={StageName.finetune.value: str(folder / "trials" / name / "finetune")},
        )  # fmt: skip
    return made


@pytest.mark.parametrize(("codes", "ended"), [((0, 3, 0), 1), ((75, 0), 75), ((0,), 0)])
def test_the_command_ends_as_its_trials_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], codes: tuple[int, ...],
    ended: int,
) -> None:  # fmt: skip
    made = planned(tmp_path, *codes)
    monkeypatch.setattr(verb, "plan", lambda _: made)
    monkeypatch.setattr(verb, "share_out", lambda *_: slots(1))
    assert main(["sweep=miniworld_smoke"]) == ended
    meaning = {0: State.done, 3: State.failed, 75: State.interrupted}
    assert [TrialFolder(path).state() for path in made.trials] == [meaning[code] for code in codes]
    rows = json.loads((tmp_path / summary.ROWS).read_text())
    assert [row["state"] for row in rows] == [meaning[code].value for code in codes]
    told = capsys.readouterr().err
    again = "python -m train sweep sweep=miniworld_smoke retry_failed=true"
    assert [words in told for words in ("trials/t1 failed: end ended with 3", "| planted", again)] == [ended == 1] * 3


def test_a_summary_is_of_the_sweep_as_it_is_defined(tmp_path: Path) -> None:
    """A sweep that is defined otherwise and killed before its end has no summary, and not that of another recipe."""
    made = planned(tmp_path, 0)
    summary.write_definition(read(["sweep=miniworld_smoke"]), made, [])
    summary.write(made, summary.rows(made))
    assert (tmp_path / "summary.json").is_file()
    summary.write_definition(read(["sweep=miniworld_smoke"]), planned(tmp_path, 0, 0), [])
    assert not list(tmp_path.glob("summary.*"))


def test_an_evaluation_of_a_part_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    made = planned(tmp_path, 0)
    for path, trial in made.trials.items():
        TrialFolder(path).write(trial)
        evals = path / "finetune" / "evals"
        evals.mkdir(parents=True)
        write_result(evals, "scene", "right", 0.5)
        write_result(evals, "scene", "none", 0.25)
        part = json.loads((evals / "scene-right.json").read_text()) | {"limit": 50, "score": 1.0}
        (evals / "scene-right-limit50.json").write_text(json.dumps(part))
    (row,) = summary.rows(made)
    assert (row["scene"], row["scene (limit 50)"]) == (0.5, 1.0)


@pytest.mark.parametrize("target", ["sweep", "ablation", "neighbours"])
@pytest.mark.parametrize(("code", "has_report"), [(0, True), (1, True), (75, False)])
def test_make_reports_on_what_failed_and_ends_so(tmp_path: Path, target: str, code: int, has_report: bool) -> None:
    said, stamp = tmp_path / "said", tmp_path / "stamp"
    stamp.touch()  # nothing is installed
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$*" >> {said}\ncase "$*" in *"train sweep"*) exit {code};; esac\n')
    fake.chmod(0o755)
    command = ["make", "-C", str(ROOT), target, f"PY={fake}", f"STAMP={stamp}"]
    # A make around the tests would hand its own settings on.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    ended = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (ended.returncode == 0) == (code == 0)
    assert ("evals.report checkpoints/miniworld_" in said.read_text()) == has_report
