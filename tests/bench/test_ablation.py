"""A sweep's trials become a row per point with its spread, and only when all of them are done."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from anchorformer.errors import UserError
from bench import ablation, report
from bench.__main__ import main
from tests.evals.runs_on_disk import write_result
from train.sweep.trial import State, Trial, TrialFolder

T = "model.selector.num_anchors"
COMMIT = "0123456789abcdef"


def add(
    sweep: Path, grid: str, seed: int, scene: float, doc: float, point: Mapping[str, Any], *,
    state: State = State.done, changes: bool = False,
) -> str:  # fmt: skip
    """A trial of 10 seconds, as a sweep that ran in another folder has left it, behind the stage 1 that all share."""
    name = f"{grid}{seed}"
    start, folder = sweep / "shared" / "0f", sweep / "trials" / name
    there = Path("checkpoints/elsewhere")
    runs = {"align": there / "shared/0f/align", "finetune": there / "trials" / name / "finetune"}
    TrialFolder(folder).write(Trial(
        id=name, point={**point, "seed": seed}, overrides=(), config_hash=name, steps=(), state=state, seconds=10.0,
        runs={stage: str(run) for stage, run in runs.items()}, needs=str(there / "shared/0f"),
    ))  # fmt: skip
    TrialFolder(start).write(Trial(id="0f", point={}, overrides=(), config_hash="0f", steps=(), runs={}, seconds=5.0))
    for run, scores in ((start / "align", {"caption": 1.5}), (folder / "finetune", {"scene": scene, "doc": doc})):
        (run / "evals").mkdir(parents=True, exist_ok=True)
        environment = {"commit": COMMIT, "uncommitted_changes": changes and run.name == "finetune"}
        (run / "environment.json").write_text(json.dumps(environment))
        for task, score in scores.items():
            write_result(run / "evals", task, "right", score)
    return name


def define(sweep: Path, *trials: str) -> Path:
    """A definition of these trials' points."""
    told = {name: TrialFolder(sweep / "trials" / name).read() for name in trials}
    points = [{"grid": name[0], "point": trial.point, "trial": name} for name, trial in told.items() if trial]
    (sweep / "sweep.json").write_text(json.dumps({"points": points}))
    return sweep


def test_a_point_is_the_mean_of_its_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, mlp, five = tmp_path / "sweep", {"connector": "mlp"}, {T: 5}
    trials = [add(sweep, "c", 0, 0.5, 0.1, mlp), add(sweep, "a", 0, 0.4, 0.2, five),
              add(sweep, "c", 1, 0.7, 0.3, mlp, changes=True), add(sweep, "a", 1, 0.4, 0.2, five)]  # fmt: skip
    add(sweep, "c", 2, 0.0, 0.0, mlp, state=State.failed)
    (sweep / "summary.json").write_text("[]")
    main(["ablation", str(define(sweep, *trials)), "--json", str(tmp_path / "ablation.json")])
    sheet = json.loads((tmp_path / "ablation.json").read_text())
    mlps, fives = sheet["rows"]
    assert (mlps["grid"], mlps["what"], mlps["seeds"], mlps["tokens"]) == ("c", "mlp", 2, 17)
    assert mlps["scene"] == pytest.approx(0.6)
    assert mlps["scene_sd"] == pytest.approx(statistics.stdev([0.5, 0.7]))
    assert mlps["mean"] == pytest.approx(0.4), "a loss is no part of it"
    assert mlps["mean_sd"] == pytest.approx(statistics.stdev([0.3, 0.5])), "of the trials' own means"
    assert (fives["what"], fives["mean_sd"]) == ("num_anchors 5", 0)
    told = {"trained_at": "0123456789ab, 0123456789ab+", "summed_trial_seconds": 45}
    assert sheet["facts"] == told, "the shared stage 1 once, and nothing of what an earlier definition has left"
    assert "num_anchors 5" in capsys.readouterr().out
    page, plots = report.render("<!-- begin ablation -->\n<!-- end ablation -->", tmp_path, "docs/plots")
    assert "| c | mlp | 17 | 2 | 1.500 ± 0.000 | 0.200 ± 0.141 | 0.600 ± 0.141 | 0.400 ± 0.141 |" in page
    ((name, svg),) = plots.items()
    assert f"](docs/plots/{name})" in page
    assert svg.count('stroke="black"') == 2


def test_a_sweep_that_has_not_ended_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no sweep that has run"):
        ablation.listed(tmp_path)
    trials = [add(tmp_path, "a", 0, 0.4, 0.2, {}), add(tmp_path, "a", 1, 0.4, 0.2, {}, state=State.failed)]
    (tmp_path / "summary.json").write_text('[{"state": "done"}]')
    with pytest.raises(UserError, match="has not ended") as refused:
        main(["ablation", str(define(tmp_path, *trials))])
    assert "1 done, 1 failed" in str(refused.value)
    assert "retry_failed=true" in str(refused.value)


def test_trials_that_are_not_evaluated_alike_are_no_result(tmp_path: Path) -> None:
    one, other = add(tmp_path, "a", 0, 0.4, 0.2, {}), add(tmp_path, "a", 1, 0.4, 0.2, {})
    write_result(tmp_path / "trials" / one / "finetune" / "evals", "chart", "right", 0.5)
    with pytest.raises(UserError, match=f"trial {other} has no score in chart"):
        main(["ablation", str(define(tmp_path, one, other))])


def test_settings_are_told_where_they_tell_points_apart() -> None:
    grid = [
        {"connector": "mlp"}, {"connector": "resampler", "model.connector.num_queries": 9, "model.connector.depth": 2},
        {"connector": "resampler", "model.connector.num_queries": 17, "model.connector.depth": 2},
    ]  # fmt: skip
    assert [ablation.label(point, grid) for point in grid] == [
        "mlp", "resampler, num_queries 9", "resampler, num_queries 17",
    ]  # fmt: skip
    plain = [{T: 5, "model.connector.depth": 2}, {T: 17, "model.connector.depth": 2}]
    assert [ablation.label(point, plain) for point in plain] == ["num_anchors 5", "num_anchors 17"]
    assert ablation.label({T: 5}, [{T: 5}]) == "num_anchors 5"
