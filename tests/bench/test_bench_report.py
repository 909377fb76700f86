"""The page of results holds what the committed files say, and nothing else."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.plot import Bar, bars
from bench.runner import Row
from bench.table import Sheet, short_commit

SVG = "{http://www.w3.org/2000/svg}"


PAGE = report.ROOT / "docs" / "benchmarks.md"


def test_pages_and_plots_are_made_from_the_committed_results() -> None:
    drawn = {}
    for path, to_plots in report.PAGES.items():
        page, plots = report.render(path.read_text(), report.RESULTS, to_plots)
        assert page == path.read_text(), "run python -m bench report"
        drawn |= plots
    assert {path.name: path.read_text() for path in report.PLOTS.glob("*.svg")} == drawn, "run python -m bench report"


def test_sections_without_results_say_so_and_rendering_twice_changes_nothing(tmp_path: Path) -> None:
    page, plots = report.render(PAGE.read_text(), tmp_path)
    assert page.count("Not measured yet.") == page.count("<!-- begin") > 3
    assert plots == {}
    assert report.render(page, tmp_path) == (page, plots)


def test_cpu_results_become_a_table_with_its_origin_and_notes(tmp_path: Path) -> None:
    sheet = Sheet("cpu", tmp_path / "cpu.json", {"size": "full", "seconds": {"a": 2.0, "b": 3.0}})
    sheet.add(Row(name="layer: time", unit="ms", old=8.0, new=2.0, equal=True, goal_ratio=5.0, note="how").to_dict())
    sheet.add(Row(name="layer: bytes", unit="MB", old=8.0, new=4.0, equal=True, note="how").to_dict())
    sheet.add(Row(name="opening", unit="s", new=1.5, goal=5.0).to_dict())
    page, plots = report.render("<!-- begin cpu -->\n<!-- end cpu -->", tmp_path)
    assert "| layer: time | ms | 8 | 2 | 4 | 5 |  | NO | yes |" in page
    assert "| opening | s |  | 1.5 |  |  | 5 | yes |  |" in page
    assert "- *layer: time; layer: bytes*: how." in page
    assert "seconds 5 in all" in page
    assert f"](plots/{next(iter(plots))})" in page


def test_a_commit_with_changes_is_told_from_one_without() -> None:
    commit = "0123456789abcdef"
    assert (short_commit(commit), short_commit(f"{commit}+")) == (commit[:12], f"{commit[:12]}+")
    assert short_commit("unknown") == "unknown"


def test_gpu_results_become_a_table_per_kind_and_name_what_was_left_out(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"what": "ladder", "stage": 2, "lengths": "counted", "rung": "as published", "samples_s": 2.0, "peak_gb": None},
        {"what": "ladder", "stage": 2, "lengths": "counted", "rung": "+ packed", "samples_s": 6.0, "peak_gb": None},
        {"what": "ladder", "stage": 2, "rung": "+ compiled", "left_out": "out of time"},
    ]
    sheet = Sheet("gpu-ladder", tmp_path / "gpu-ladder.json")
    for row in rows:
        sheet.add(row)
    page, plots = report.render("<!-- begin gpu-ladder -->\n<!-- end gpu-ladder -->", tmp_path)
    assert "| stage | lengths | rung | samples_s |\n" in page
    assert "- what ladder, stage 2, rung + compiled: out of time" in page
    (svg,) = plots.values()
    assert [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")][1:] == [
        "as published", "2/s", "+ packed", "6/s",
    ]  # fmt: skip


@pytest.mark.parametrize("logarithmic", [False, True])
def test_bars_are_as_long_as_their_values(logarithmic: bool) -> None:
    values = [4.0, 2.0, 16.0]
    svg = bars("a < b", "x", [Bar(label="&", value=value, goal=8.0) for value in values], logarithmic=logarithmic)
    widths = [float(box.get("width", "")) for box in list(ElementTree.fromstring(svg).iter(f"{SVG}rect"))[1:]]
    shares = [width / widths[2] for width in widths]
    assert shares == pytest.approx([0.5, 0.25, 1.0] if logarithmic else [0.25, 0.125, 1.0], abs=0.01)


def test_a_result_is_whole_after_every_row(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cpu.json"
    sheet = Sheet("cpu", path)
    sheet.add({"name": "first"})
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["first"]
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["cpu.json"]
