"""`python -m bench generate` at toy sizes: every row is there and says what it compares; times are not looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench import generate, table
from bench.gpu.shapes import CONNECTORS


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path, threads = tmp_path_factory.mktemp("generate") / "rows.json", torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        # A process of its own makes memory exact, and this slow.
        patch.setattr(generate, "in_fresh_process", lambda function, scale: function(scale))
        assert (
            command.main(["generate", "--tiny", "--repeats", "1", "--sides", "28", "56", "--json", str(path)]) is None
        )
    torch.set_num_threads(threads)
    return table.read(path)


def test_every_model_at_every_side(sheet: dict[str, Any]) -> None:
    assert len(sheet["rows"]) == 2 * len(CONNECTORS) * 3
    names = [row["name"] for row in sheet["rows"] if row["name"].endswith("time to first token")]
    assert [name.split(", ")[2] for name in names] == [
        f"{count} visual tokens: time to first token" for count in (49, 8, 9, 196, 8, 9)
    ]
    assert all(row["new"] > 0 for row in sheet["rows"])


def test_the_others_are_compared_with_the_mlp(sheet: dict[str, Any]) -> None:
    for row in sheet["rows"]:
        assert (row["old"] is None) == ("MLP" in row["name"])
        assert row["met"] is None  # a toy reaches no goal
        if row["name"].endswith("time to first token") and row["old"]:
            assert "FLOP ratio" in row["note"]


def test_goals_are_a_share_of_the_flop_ratio() -> None:
    scale = generate.scale_of("cpu", tiny=True)
    mlp, _, ours = (generate.Asked(scale, kind, generate.build_language_model(scale)) for kind in CONNECTORS)
    figures = dict.fromkeys(CONNECTORS, 1.0)
    first = {**figures, "mlp": 2.0}
    work = {"mlp": 3.0, "resampler": 1.0, "anchor_former": 1.0}
    row, *_ = generate._compared(ours, 28, first, figures, figures, work, True)
    assert (row.ratio, row.goal_ratio, row.met) == (2.0, pytest.approx(0.85 * 3), False)
    row, *_ = generate._compared(mlp, 28, first, figures, figures, work, True)
    assert row.met is None


def test_toys_run_on_the_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--tiny", "--device", "cuda"])
    assert "--tiny runs on the CPU" in capsys.readouterr().err
