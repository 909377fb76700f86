"""A sweep's trials become a row per point with its spread, and only when all of them are done."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from anchorformer.errors import UserError
from bench import ablation, report
from bench.__main__ import main

T = "model.selector.num_anchors"


def trial(grid: str, seed: int, scene: float, doc: float, **axes: Any) -> dict[str, Any]:
    point = {"connector": None, T: None} | axes
    return {
        "grid": grid, **point, "seed": seed, "trial": f"{grid}{point}{seed}", "state": "done", "tokens": 17,
        "miniworld_caption": 1.5, "miniworld_scene": scene, "miniworld_doc": doc, "seconds": 10.0, "reason": "",
    }  # fmt: skip


def sweep(folder: Path, found: list[dict[str, Any]]) -> Path:
    run = folder / "trials" / "0" / "finetune"
    run.mkdir(parents=True)
    (run / "environment.json").write_text(json.dumps({"commit": "0123456789abcdef"}))
    (folder / "summary.json").write_text(json.dumps(found))
    return folder


def test_a_point_is_the_mean_of_its_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        trial("connectors", 0, 0.5, 0.1, connector="mlp"), trial("anchors", 0, 0.4, 0.2, **{T: 5}),
        trial("connectors", 1, 0.7, 0.3, connector="mlp"), trial("anchors", 1, 0.4, 0.2, **{T: 5}),
        trial("connectors", 1, 0.7, 0.3, connector="mlp"),
    ]  # fmt: skip
    main(["ablation", str(sweep(tmp_path, found)), "--json", str(tmp_path / "ablation.json")])
    sheet = json.loads((tmp_path / "ablation.json").read_text())
    mlp, five = sheet["rows"]
    assert (mlp["grid"], mlp["what"], mlp["seeds"], mlp["tokens"]) == ("connectors", "mlp", 2, 17)
    assert mlp["scene"] == pytest.approx(0.6)
    assert mlp["scene_sd"] == pytest.approx(statistics.stdev([0.5, 0.7]))
    assert mlp["mean"] == pytest.approx(0.4), "a loss is no part of it"
    assert mlp["mean_sd"] == pytest.approx(statistics.stdev([0.3, 0.5])), "of the trials' own means"
    assert (five["what"], five["mean_sd"]) == ("num_anchors 5", 0)
    assert sheet["facts"] == {"trained_at": "0123456789ab", "seconds": 40.0}
    assert "num_anchors 5" in capsys.readouterr().out
    page, plots = report.render("<!-- begin ablation -->\n<!-- end ablation -->", tmp_path, "docs/plots")
    assert "| connectors | mlp | 17 | 2 | 1.500 ± 0.000 | 0.600 ± 0.141 | 0.200 ± 0.141 | 0.400 ± 0.141 |" in page
    ((name, svg),) = plots.items()
    assert f"](docs/plots/{name})" in page
    assert svg.count('stroke="black"') == 2


def test_a_sweep_that_has_not_ended_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no sweep that has run"):
        ablation.points(tmp_path)
    half = [trial("anchors", 0, 0.4, 0.2), {**trial("anchors", 1, 0.4, 0.2), "state": "failed"}]
    with pytest.raises(UserError, match="has not ended") as refused:
        ablation.points(sweep(tmp_path, half))
    assert "failed" in str(refused.value)
