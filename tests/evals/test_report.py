"""The report in words: right figures from a run's files, and plain words where there are none."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from anchorformer.errors import UserError
from evals.config import Condition
from evals.report import __main__ as command
from evals.report import figures, tables
from evals.report.gathering import gather
from evals.report.overlays import answers
from evals.report.plots import pareto
from evals.report.seeds import essential, group
from tests.evals.runs_on_disk import config, write_result, write_stage, write_sweep


def cells(text: str, first: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def report(*paths: Path, timings: tables.Timings | None = None) -> str:
    entries = gather(paths)
    return tables.page(paths[0].name, entries, group(entries), timings or {})


def run_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, words)])
    assert command.main() == 0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    write_stage(folder / "finetune", [2.0] * 10 + [1.0] * 5 + [0.5] * 10, {
        "scene": {"right": 0.58, "shuffled": 0.30, "none": 0.25}, "doc": {"right": 0.75},
    })  # fmt: skip
    write_stage(folder / "align", [4.0] * 10 + [0.8] * 10)
    return folder


def test_stages_in_the_order_they_were_trained(run: Path) -> None:
    text = report(run)
    assert text.index("| align") < text.index("| finetune")
    assert cells(text, "align") == ["align", "20", "4.000", "0.800", "400", "8.0", "10.0", "1.17", "done"]
    assert text.splitlines()[0] == "# demo"
    assert "Trained on here: Python 3.11, torch 2; commit abc." in text
    assert "Evaluated on 2 cores of a test." in text


def test_accuracy_beside_its_baselines(run: Path) -> None:
    rows = {
        line.split("|")[2].strip(): [cell.strip() for cell in line.split("|")]
        for line in report(run).splitlines()
        if "exact_match" in line
    }
    assert rows["scene"][1:5] == ["finetune", "scene", "exact_match", "100"]
    assert rows["scene"][5:10] == ["0.580", "0.300", "0.250", "+0.280", "15.00"]
    assert rows["doc"][5:9] == ["0.750", "", "", ""]


def test_seconds_of_every_part_and_their_sum(run: Path, tmp_path: Path) -> None:
    (tmp_path / "installed").write_text(json.dumps({"seconds": 100}))
    (tmp_path / "world.json").write_text(json.dumps({"seconds": {"clip": 150.5, "llama": 49.5}, "other": 1}))
    timings = command.read_timings([f"install={tmp_path}/installed", f"mini world={tmp_path}/world.json"])
    text = report(run, timings=timings)
    assert cells(text, "install") == ["install", "100.0"]
    assert cells(text, "mini world: clip") == ["mini world: clip", "150.5"]
    assert cells(text, "evaluation after finetune") == ["evaluation after finetune", "6.0"]
    assert cells(text, "sum") == ["sum", f"{100 + 200 + 10 + 12.5 + 6:.1f}"]


def test_a_file_without_seconds_is_named(run: Path) -> None:
    with pytest.raises(UserError, match="no `seconds` in it"):
        command.read_timings([f"install={run}/align/environment.json"])
    with pytest.raises(UserError, match="PART=FILE"):
        command.read_timings(["install"])


def test_a_single_stage_is_a_report_too(run: Path) -> None:
    assert report(run / "align").startswith("# align")
    assert "No task has been evaluated" in report(run / "align")


def test_the_command_prints_what_it_writes(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "installed").write_text('{"seconds": 3}')
    run_command(monkeypatch, run, "--no-html", "--seconds", f"install={run}/installed")
    assert (run / "report.md").read_text() in capsys.readouterr().out
    assert not list(run.glob("*.tmp"))
    assert not (run / "report.html").exists()
    scores = list(csv.DictReader((run / "report-scores.csv").open()))
    assert [(row["task"], row["right image"], row["no image"]) for row in scores] == [
        ("doc", "0.75", ""), ("scene", "0.58", "0.25"),
    ]  # fmt: skip


def test_seconds_that_were_told_once_are_remembered(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "installed").write_text('{"seconds": 3}')
    run_command(monkeypatch, run, "--no-html", "--seconds", f"install={run}/installed")
    first = (run / "report.md").read_text()
    (run / "installed").unlink()
    run_command(monkeypatch, run, "--no-html")
    assert (run / "report.md").read_text() == first
    assert cells(first, "install") == ["install", "3.0"]


def test_a_loss_gains_by_being_lower(run: Path) -> None:
    for condition, score in (("right", 1.2), ("shuffled", 1.5)):
        write_result(run / "align" / "evals", "caption", condition, score)
    text = report(run)
    row = next(line for line in text.splitlines() if "loss_per_token" in line)
    assert [cell.strip() for cell in row.split("|")][5:9] == ["1.200", "1.500", "", "+0.300"]
    assert "for a loss, which is better when lower, shuffled - right" in text


def test_a_part_of_a_task_has_a_row_of_its_own(run: Path) -> None:
    full = run / "finetune" / "evals" / "doc-right.json"
    part = {**json.loads(full.read_text()), "limit": 8, "n_scored": 8, "score": 0.5}
    full.with_name("doc-right-limit8.json").write_text(json.dumps(part))
    rows = [[cell.strip() for cell in line.split("|")] for line in report(run).splitlines() if "| doc" in line]
    assert [row[2:6] for row in rows] == [
        ["doc", "exact_match", "100", "0.750"], ["doc (limit 8)", "exact_match", "8", "0.500"],
    ]  # fmt: skip


def test_the_folder_of_runs_names_them(run: Path) -> None:
    write_stage(run.parent / "other" / "align", [1.0])
    with pytest.raises(UserError) as caught:
        report(run.parent)
    assert caught.value.remedy == f"pass one or more of {run}, {run.parent}/other"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to report"):
        report(tmp_path)
    with pytest.raises(UserError, match="nothing to report"):
        report(tmp_path / "absent")


def test_several_folders_need_a_place_of_their_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="lies in none of them"):
        run_command(monkeypatch, run / "align", run / "finetune")
    run_command(monkeypatch, run / "align", run / "finetune", "--out", run / "both", "--no-html")
    assert cells((run / "both" / "report.md").read_text(), "align")[:3] == ["align", "", "done"]


@pytest.mark.parametrize("content", ["{}x\n", '{"step": 1}\n[1]\n'])
def test_a_damaged_metrics_file_is_named(run: Path, content: str) -> None:
    (run / "align" / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"align/metrics\.jsonl cannot be read"):
        report(run)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("finetune/evals/doc-right.json", '{"task": "doc"}'),
        ("finetune/evals/doc-right.json", "[]"),
        ("align/config.yaml", "a: [1"),
        ("align/config.yaml", "- a"),
        ("align/environment.json", "{"),
        ("align/health.jsonl", '{"coverage": 1}\n'),
    ],
)
def test_a_damaged_file_is_named(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(UserError, match=rf"{Path(name).name} cannot be read"):
        report(run)


@pytest.mark.parametrize("name", ["sweep.json", "trials/t00/trial.json"])
def test_a_damaged_sweep_is_named(tmp_path: Path, name: str) -> None:
    sweep = write_sweep(tmp_path / "ablation", with_media=False)
    (sweep / name).write_text('{"points": [{"trial": "t00"}]}')
    with pytest.raises(UserError, match=rf"{Path(name).name} cannot be read"):
        report(sweep)


def test_a_run_that_goes_on_says_so(run: Path) -> None:
    write_stage(run / "third", [3.0, 2.0], state="LOCK")
    write_stage(run / "fourth", [], state="")
    text = report(run)
    assert "- third is running or killed" in text
    assert "- third: the last line of metrics.jsonl is not complete and was left out" in text
    assert "- fourth has not ended" in text
    assert "- fourth: no step has been taken yet" in text
    assert cells(text, "third")[1:4] == ["2", "3.000", "2.000"]
    assert cells(text, "fourth")[1:6] == ["0", "", "", "", ""]


def test_a_sweep_of_which_a_trial_failed(tmp_path: Path) -> None:
    text = report(write_sweep(tmp_path / "ablation"))
    lines = [line for line in text.splitlines() if line.startswith(("| t0", "| t1"))]
    overview = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:12]]
    assert [row[:4] for row in overview][:2] == [["t00", "anchor", "5", "0"], ["t01", "anchor", "5", "1"]]
    assert [row[4] for row in overview] == ["done"] * 10 + ["running or killed", "failed"]
    # The failed trial has the shared align and nothing of its own; the running one has no score yet.
    assert overview[-1][5:10] == ["align", "", "", "1.200", ""]
    assert overview[-2][5:10] == ["finetune", "", "", "1.200", ""]
    assert float(overview[0][6]) == pytest.approx(0.4 + 0.1609 - 0.1 + 0.05, abs=1e-3)
    assert "- 1 of 12 trials: failed (selector=random, num_anchors=17, seed=1)" in text
    assert cells(text, "sum") == ["sum", f"{10 + 1.5 + 10 * (250 + 6 * 1.5) + 3.5:,.1f}"]


def test_a_sweep_may_be_moved(tmp_path: Path) -> None:
    before = report(write_sweep(tmp_path / "ablation", with_media=False))
    (tmp_path / "ablation").rename(tmp_path / "moved")
    assert report(tmp_path / "moved") == before.replace("# ablation", "# moved")


def test_a_trial_of_two_grids_is_one_row(tmp_path: Path) -> None:
    """What no grid of a trial names is what its config has."""
    sweep = tmp_path / "ablation"
    points = {"t0": {"selector": "random"}, "t1": {"model.connector.depth": 6}}
    for name, point in points.items():
        depth = point.get("model.connector.depth", 2)
        own = config(selector=point.get("selector", "anchor"), depth=depth)
        write_stage(sweep / "trials" / name / "finetune", [1.0], config=own)
        (sweep / "trials" / name / "trial.json").write_text(json.dumps({"point": point, "state": "done"}))
    listed = [{"grid": "selectors", "point": points["t0"], "trial": "t0"},
              {"grid": "depths", "point": points["t1"], "trial": "t1"},
              {"grid": "selectors", "point": {"selector": "anchor"}, "trial": "t1"}]  # fmt: skip
    (sweep / "sweep.json").write_text(json.dumps({"points": listed}))
    text = report(sweep)
    assert cells(text, "trial")[:4] == ["trial", "grid", "selector", "depth"]
    assert "are left out" not in text
    assert cells(text, "t0")[:4] == ["t0", "selectors", "random", "2"]
    assert cells(text, "t1")[:4] == ["t1", "depths selectors", "anchor", "6"]


def test_what_an_earlier_definition_has_left_is_no_trial_of_the_sweep(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "ablation", with_media=False)
    definition = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({"points": definition["points"][2:]}))
    text = report(folder)
    assert "- ablation: 2 trial(s) of an earlier definition of the sweep are left out" in text
    assert [name for name in ("t00", "t01", "t02") if f"| {name} " in text] == ["t02"]
    assert len(gather([folder])) == 10
    (folder / "sweep.json").write_text(json.dumps({"points": []}))
    with pytest.raises(UserError, match="has begun") as refused:
        gather([folder])
    assert "trials of an earlier definition: 12" in str(refused.value)


def test_milliseconds_that_were_not_measured_alike_are_weighed_against_nothing(tmp_path: Path) -> None:
    runs = [write_stage(tmp_path / name, [1.0], {"scene": {"right": 0.5}}, config=config(depth=n))
            for n, name in enumerate("ab")]  # fmt: skip
    for run, features in zip(runs, ("cached", "cached"), strict=True):
        note_of_result(run, vision_features=features)
    assert figures.COSTS["ms/question"] in costs_to_choose(runs)
    assert "- ms/question are without the vision tower, whose features came from the cache" in report(*runs)
    note_of_result(runs[0], vision_features="live")
    assert figures.COSTS["ms/question"] not in costs_to_choose(runs)
    assert "so that ms/question do not compare (different: vision_features)" in report(*runs)


def costs_to_choose(runs: Sequence[Path]) -> Sequence[str]:
    plot = pareto(group(gather(runs)))
    assert plot is not None
    return plot.choices["cost"]


def note_of_result(run: Path, **facts: object) -> None:
    path = run / "evals" / "scene-right.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_runs_that_differ_in_seeds_are_repetitions(tmp_path: Path) -> None:
    scores: Sequence[float] = (0.5, 0.6, 0.7)
    for seed, score in enumerate(scores):
        evals, commit = {"scene": {"right": score}}, f"c{seed % 2}"
        # What decides nothing may differ with the seed.
        other = {"checkpoint": {"every": seed}, "watchdog": {"step_seconds": seed}, "profile": f"step:{seed}",
                 "hardware": {"threads": seed}, "health": {"every": seed},
                 "data": {"cache_dir": str(seed), "feature_cache": str(seed), "shards": str(seed)}}  # fmt: skip
        write_stage(tmp_path / f"run{seed}", [1.0], evals, config=config(seed) | other, commit=commit)
    write_stage(tmp_path / "deep", [1.0], {"scene": {"right": 0.9}}, config=config(0, depth=6))
    write_stage(tmp_path / "unknown", [1.0], {"scene": {"right": 0.9}})
    text = report(*(tmp_path / name for name in ("run0", "deep", "run1", "run2", "unknown")))
    seeds = text[text.index("## Seeds") :]
    assert cells(seeds, "depth=2")[1:] == ["scene", "3", "0.600", "0.100", "0: 0.500, 1: 0.600, 2: 0.700", "2"]
    assert cells(seeds, "deep")[1:] == ["scene", "1", "0.900", "", "0: 0.900", "1"]
    assert cells(seeds, "unknown")[1:5] == ["scene", "1", "0.900", ""]


def test_every_way_in_which_models_were_asked_has_a_row(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "neighbours", with_media=False)
    assert "How models were asked" not in report(folder), "a table that would repeat another one"
    definition = json.loads((folder / "sweep.json").read_text())
    definition["definition"] = {"note": "Experimental: of a test."}
    (folder / "sweep.json").write_text(json.dumps(definition))
    for seed, score in ((0, 0.5), (1, 0.7)):
        trial = folder / "trials" / f"t{seed:02d}" / "finetune" / "evals" / "damro"
        (trial / "submissions").mkdir(parents=True)
        (trial / "submissions" / "scene-right.json").write_text("[]")
        for task in ("scene", "doc"):
            write_result(trial, task, "right", score, 5)
            result = json.loads((trial / f"{task}-right.json").read_text())
            result["time"] |= {"seconds": 2.0 + seed, "peak_memory_gib": 0.75 + seed}
            (trial / f"{task}-right.json").write_text(json.dumps(result))
    text = report(folder)
    assert "- Experimental: of a test." in text
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| selector=")
    ]
    own, damro = (
        row for row in rows if row[0] == "selector=anchor, num_anchors=5" and row[1] in ("as trained", "damro")
    )
    assert own[2] == damro[2] == "2"
    assert damro[3:] == ["0.600", "0.600", "0.600", "5", "25.00", "1.750"]
    assert own[6:] == ["5", "15.00", ""]
    assert len([row for row in rows if row[1] == "damro"]) == 1
    told = [
        line
        for line in text.splitlines()
        if line.startswith("| evaluation after selector=anchor, num_anchors=5, seed=0")
    ]
    assert "13.0" in told[0], "three conditions of two tasks in 1.5 s each, and two more tasks in 2 s"


def test_scores_of_other_questions_are_not_set_side_by_side_in_silence(tmp_path: Path) -> None:
    for name in "ab":
        write_stage(tmp_path / name, [1.0], {"scene": {"right": 0.5}, "doc": {"right": 0.5}})
    assert "do not compare" not in report(tmp_path / "a", tmp_path / "b")
    result = tmp_path / "a" / "evals" / "doc-right.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"n": 7}))
    text = report(tmp_path / "a", tmp_path / "b")
    assert "- not asked alike everywhere, so that scores do not compare: doc (different: n)" in text


def test_a_loss_that_is_not_finite_is_told_as_it_is(tmp_path: Path) -> None:
    write_stage(tmp_path / "align", [1.0, float("nan")])
    assert cells(report(tmp_path / "align"), "align")[2:4] == ["1.000", "nan"]


def test_an_answer_may_hold_any_character(tmp_path: Path) -> None:
    write_stage(tmp_path / "a", [1.0], {"scene": {"right": 0.5}})
    path = tmp_path / "a" / "evals" / "scene-right.jsonl"
    path.write_text(path.read_text().replace("<b>right</b>", "one\u2028two\x85three"), "utf-8")
    [found] = answers(group(gather([tmp_path / "a"])))
    assert found.rows[0][2][0] is not None
    assert found.rows[0][2][0][0] == "one\u2028two\x85three"


def test_time_is_of_the_questions_that_it_was_spent_on(tmp_path: Path) -> None:
    """An evaluation that was killed is not asked again what it had answered, and its seconds are the last attempt's."""
    write_stage(tmp_path / "a", [1.0], {"scene": {"right": 0.5}})
    path = tmp_path / "a" / "evals" / "scene-right.json"
    result = json.loads(path.read_text())
    for before, expected in ((0, 15.0), (90, 150.0), (100, None)):
        path.write_text(json.dumps(result | {"time": {"seconds": 1.5, "answered_before": before}}))
        [entry] = gather([tmp_path / "a"])
        assert figures.costs(entry)["ms/question"] == expected
        assert figures.ms_per_question(entry.stages[0].results["scene"][Condition.right]) == expected


def test_the_seed_of_a_selector_is_no_repetition() -> None:
    values = {"seed": 1, "finetune:seed": 2, "model.selector.seed": 3, "run": "x"}
    assert essential(values) == {"model.selector.seed": 3}
