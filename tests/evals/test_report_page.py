"""The report's page: what is drawn, that nothing a run wrote can act in it, and how a browser takes it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorformer.errors import UserError
from evals.report import __main__ as command
from evals.report import page as pages
from evals.report.curves import LOSS, POINTS, curves, thin
from evals.report.gathering import gather
from evals.report.overlays import answers, gallery
from evals.report.parallel import Scale, parallel
from evals.report.plots import front, pareto, seeds
from evals.report.seeds import group
from tests.browser import CHROMIUM
from tests.evals.runs_on_disk import config, write_media, write_stage, write_sweep

HEADLESS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1280,2000",
    "--virtual-time-budget=20000",
)  # fmt: skip


def written(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: object) -> str:
    monkeypatch.setattr(sys, "argv", ["report", str(folder), *map(str, more)])
    assert command.main() == 0
    return (folder / "report.html").read_text("utf-8")


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=4 * POINTS))
def test_thinned_curves_keep_the_mean(values: list[float]) -> None:
    steps = list(range(1, len(values) + 1))
    xs, ys = thin(steps, values)
    assert len(xs) == len(ys) <= POINTS
    assert (xs[-1] if xs else None) == (steps[-1] if steps else None)
    finite = [value for value in values if value == value]
    there = [y for y in ys if y is not None]
    assert bool(there) == bool(finite)
    assert all(min(finite) - 1e-6 <= y <= max(finite) + 1e-6 for y in there)
    assert not finite or max(y for y in thin(steps, values, by_largest=True)[1] if y is not None) == max(finite)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_the_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    expected = {
        one for one in points
        if not any(other != one and other[0] <= one[0] and other[1] >= one[1] for other in points)
    }  # fmt: skip
    assert front(points) == sorted(expected)


def test_places_on_an_axis() -> None:
    numbers = Scale([5, 9, None, 17])
    assert [numbers.place(value) for value in (5, 9, 17, None)] == [0, pytest.approx(1 / 3), 1, None]
    words = Scale(["anchor", "random", "all"])
    assert [words.place(value) for value in ("anchor", "random", "all")] == [0, 0.5, 1]
    assert Scale([2, 2]).place(2) == 0.5
    assert [text for _, text in Scale([0.0, 0.1, 0.2, 0.3, 0.4, 0.8]).ticks()] == ["0", "0.2", "0.4", "0.6", "0.8"]


def test_a_sweep_is_drawn(tmp_path: Path) -> None:
    """Its figures are what Plotly knows, and their points the ones on disk."""
    graph = pytest.importorskip("plotly.graph_objects")
    entries = gather([write_sweep(tmp_path / "ablation")])
    groups = group(entries)
    assert [len(members.entries) for members in groups] == [2, 2, 2, 2, 2, 1, 1]
    drawn = [pareto(groups), parallel(entries), seeds(groups), *curves(groups)]
    for plot in drawn:
        assert plot is not None
        assert all(
            len(key.split(",")) == len(plot.choices) or (key == "" and not plot.choices) for key in plot.variants
        )
        for figure in plot.variants.values():
            graph.Figure(figure)

    weighed = pareto(groups)
    assert weighed is not None
    assert weighed.choices["cost"][0] == "visual tokens per image"
    line = weighed.variants["0,0"]["data"][0]
    assert line["x"] == [5, 9, 17]  # at equal tokens the anchors are the better ones

    lines = parallel(entries)
    assert lines is not None
    assert len(lines.variants[""]["data"]) == 10  # neither the one that runs nor the one that failed
    assert lines.variants[""]["layout"]["xaxis"]["ticktext"][:3] == ["selector", "num_anchors", "seed"]

    align, finetune = curves(groups)
    assert len(align.variants["0"]["data"]) == 1  # shared by all trials, drawn once
    assert finetune.choices["curve"][0] == LOSS
    assert max(len(trace["x"]) for trace in finetune.variants["0"]["data"]) <= POINTS
    assert "mean over up to 3 steps" in finetune.note


def test_records_beside_the_steps_are_curves_of_their_own(tmp_path: Path) -> None:
    run = write_stage(tmp_path / "align", [2.0, 1.0], config=config())
    (run / "health.jsonl").write_text('{"step": 1, "coverage": 0.2, "heads": {"overlap": 0.5}}\n{"step": 2, "cov')
    (run / "evals.jsonl").write_text(
        '{"step": 2, "dataset": "charts", "loss": 1.5}\n{"step": 2, "task": "doc", "score": 0.25, "n": 8}\n'
    )
    entries = gather([run])
    (plot,) = curves(group(entries))
    assert plot.choices["curve"][-4:] == [
        "validation: charts loss", "validation: doc score", "anchors: coverage", "anchors: heads.overlap",
    ]  # fmt: skip
    assert "the last line of health.jsonl is not complete and was left out" in entries[0].stages[0].notes


def test_overlays_of_the_same_images(tmp_path: Path) -> None:
    runs = [write_stage(tmp_path / name, [1.0], config=config(depth=n)) for n, name in enumerate("ab")]
    write_media(runs[0], 10, ["old"])
    write_media(runs[0], 20, ["cat", "dog"])
    write_media(runs[1], 20, ["dog"])
    (runs[1] / "media" / "step-00000030").mkdir()  # a kill came before its answers
    found = gallery(group(gather(runs)))
    assert found is not None
    assert list(found.columns) == ["a (step-00000020)", "b (step-00000020)"]
    assert list(found.rows) == ["cat", "dog"]
    assert [cell is not None for cell in found.rows["cat"]] == [True, False]
    dog = found.rows["dog"][0]
    assert dog is not None
    assert dog.caption == {"question": "what is <i>dog</i>?", "answer": "</script>", "reference": "dog / or so"}

    (runs[0] / "media" / "step-00000020" / "0-0.png").write_bytes(b"no image")
    damaged = gallery(group(gather(runs)))
    assert damaged is not None
    assert "cannot be decoded" in damaged.notes[0]
    (runs[1] / "media" / "step-00000020" / "answers.json").write_text('[{"id": 1}]')
    with pytest.raises(UserError, match=r"answers\.json cannot be read"):
        gallery(group(gather(runs)))


def test_of_many_groups_every_selector_is_shown(tmp_path: Path) -> None:
    points = [*(("anchor", depth) for depth in range(9)), ("average", 2), ("random", 2)]
    runs = [write_stage(tmp_path / f"{selector}{depth}", [1.0], {"doc": {"right": 0.5}},
                        config=config(selector=selector, depth=depth)) for selector, depth in points]  # fmt: skip
    for run in runs:
        write_media(run)
    groups = group(gather(runs))
    found = gallery(groups)
    assert found is not None
    names = [column.partition(" ")[0] for column in found.columns]
    assert names == [*(f"anchor{depth}" for depth in range(6)), "average2", "random2"]
    assert found.notes == ["shown are 8 of 11 groups with overlays, each selector in one of them"]
    assert list(answers(groups)[0].columns) == names


def test_answers_to_questions_that_all_were_asked(tmp_path: Path) -> None:
    runs = [write_stage(tmp_path / name, [1.0], {"doc": {"right": 0.5}}, config=config(depth=len(name))) for name in
            ("a", "bb")]  # fmt: skip
    predictions = runs[1] / "evals" / "doc-right.jsonl"
    _, *others = map(json.loads, predictions.read_text().splitlines())
    others[-1]["prompt_sha256"] = "another prompt"
    predictions.write_text("".join(json.dumps(row) + "\n" for row in others))
    (found,) = answers(group(gather(runs)))
    assert [(name, references) for name, references, _ in found.rows] == [("q1", "x & y")]
    assert found.rows[0][2] == [("<b>right</b>", 1.0), ("<b>right</b>", 1.0)]


def test_nothing_that_a_run_wrote_acts_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "plotly", lambda: "/* the library */")
    evil = "</script><script>alert(1)</script>\u2028"
    run = write_stage(
        tmp_path / "run", [1.0, float("nan")], {"doc": {"right": 0.5}}, config=config() | {"note": evil, evil: 1},
    )  # fmt: skip
    result = run / "evals" / "doc-right.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"task": '<a href="https://a.test">doc</a>'}))
    write_media(run)
    html = written(run, monkeypatch)
    assert html.count("<script") == 3
    assert html.count("</script>") == 3
    assert "<b>right</b>" not in html
    assert "<i>" not in html
    tasks = next(plot for plot in data_of(html)["plots"] if plot["name"] == "conditions")["variants"][""]["data"][0][
        "x"
    ]
    assert tasks == ['&lt;a href="https://a.test">doc&lt;/a>']
    record = data_of(html)["runs"][0]["sections"]
    assert record["configuration"]["note"] == evil
    assert record["outcome"]["its loss"] is None  # JSON has no word for it
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy
    assert "default-src &#x27;none&#x27;" in policy[1]
    assert "unsafe-eval" not in policy[1]
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)", html)


def test_without_plotly_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_stage(tmp_path / "run", [1.0])
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match="needs Plotly") as caught:
        written(run, monkeypatch)
    assert "[report]" in caught.value.remedy
    assert not (run / "report.md").exists()
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--no-html"])
    assert command.main() == 0
    assert (run / "report.md").exists()


def browse(html: Path) -> tuple[str, Sequence[str]]:
    """The document after its scripts have run, and what the console has said."""
    assert CHROMIUM
    done = subprocess.run(
        [CHROMIUM, *HEADLESS, f"--user-data-dir={html.parent / 'profile'}", "--dump-dom", html.as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_a_browser_shows_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and offline, without a word on the console; a script that is not the page's own is refused, and told of."""
    folder = write_sweep(tmp_path / "ablation")
    html = written(folder, monkeypatch)
    shown, console = browse(folder / "report.html")
    assert console == []
    plots = data_of(html)["plots"]
    assert {plot["name"] for plot in plots} == {
        "pareto", "parallel", "spread", "conditions", "curves-align", "curves-finetune",
    }  # fmt: skip
    for plot in plots:
        place = shown[shown.index(f'id="plot-{plot["name"]}"') :]
        assert 'class="main-svg"' in place[:3000]
    assert shown.count('class="trace scatter') > 20
    assert "<td>model.selector._target_</td>" in shown[shown.index('id="differences"') :]

    (tmp_path / "planted.html").write_text(html.replace("</body>", "<script>document.title = 'mine'</script></body>"))
    shown, console = browse(tmp_path / "planted.html")
    assert "<title>mine" not in shown
    assert any("Content Security Policy" in line for line in console)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_what_a_reader_chooses_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another curve, another order of the table, another pair of runs, clicked by a script; the policy is lifted."""
    folder = write_sweep(tmp_path / "ablation")
    html = written(folder, monkeypatch)
    clicks = """<script>
      const change = (select, value) => { select.value = value; select.onchange(); };
      const heading = [...document.querySelectorAll("#table-runs th")].find((th) => th.textContent === "doc");
      heading.firstElementChild.click(); heading.firstElementChild.click();
      document.body.dataset.first = document.querySelector("#table-runs tbody tr").textContent;
      document.body.dataset.last = document.querySelector("#table-runs tbody tr:last-child").textContent;
      change(document.querySelector("select[data-plot=curves-finetune]"), 1);
      document.body.dataset.axis = document.getElementById("plot-curves-finetune").layout.yaxis.title.text;
      change(document.getElementById("choose-one"), 1); change(document.getElementById("choose-other"), 1);
      document.body.dataset.difference = document.getElementById("differences").textContent;
    </script></body>"""
    lifted = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", clicks)
    (tmp_path / "clicked.html").write_text(lifted)
    shown, console = browse(tmp_path / "clicked.html")
    assert console == []
    told = dict(re.findall(r'data-(first|last|axis|difference)="([^"]*)"', shown[shown.index("<body") :]))
    assert told["first"].startswith("t05anchor171done")  # the best one
    assert told["last"].startswith("t11")  # without a score: below, in either direction
    assert told["axis"].startswith("gradient norm")
    assert told["difference"] == "They do not differ."
