"""The CPU benchmarks at toy sizes: every comparison holds and can fail, bytes are exact; times are not looked at."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anchorformer.errors import UserError
from bench import __main__ as command
from bench import cpu, runner, selection, table
from bench.lengths import mixture, real
from bench.published import batching
from bench.published.selection import select
from bench.runner import Row, Size


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "deep" / "cpu.json"
    threads = torch.get_num_threads()
    assert command.main(["cpu", "--tiny", "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    return table.read(path)


def test_ours_equals_published_everywhere(sheet: dict[str, Any]) -> None:
    assert [row["name"] for row in sheet["rows"] if row["equal"] is not True] == []
    assert set(sheet["facts"]["seconds"]) == set(cpu.SECTIONS)


@pytest.mark.parametrize(
    ("start", "unit", "least"),
    [
        # Logits of a tenth of the positions without their fp32 copies; what lean layers keep at this width.
        ("head", "MB", 15.0), ("one language-model layer, width 64, frozen", "KiB", 1.5),
        ("one language-model layer, width 64, trainable", "KiB", 1.35), ("connector, fused", "MB", 1.05),
        ("connector, folded", "MB", 1.1), ("useful compute", "share", 2.5),
    ],
)  # fmt: skip
def test_what_does_not_depend_on_the_machine_is_better_by_this_much(
    sheet: dict[str, Any], start: str, unit: str, least: float
) -> None:
    ratios = [row["ratio"] for row in sheet["rows"] if row["name"].startswith(start) and row["unit"] == unit]
    assert ratios
    assert min(ratios) >= least


def test_useful_share_of_our_batches(sheet: dict[str, Any]) -> None:
    assert min(row["new"] for row in sheet["rows"] if row["unit"] == "share") >= 0.95


def test_a_result_says_where_it_comes_from(sheet: dict[str, Any]) -> None:
    assert sheet["benchmark"] == "cpu"
    assert sheet["threads"] == 1
    assert sheet["versions"]["torch"] == torch.__version__
    assert sheet["cpu"]
    assert sheet["memory_gb"] > 0


def test_a_wrong_result_is_not_equal_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = selection.select_anchors
    monkeypatch.setattr(selection, "select_anchors", lambda scores, anchors: right(scores, anchors).roll(1, dims=1))
    assert cpu.main(["--tiny", "--only", "selection"]) == 1
    assert "not equal: ['selection, T=9" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["gpu-huge"], ["cpus", "--full"]])
def test_unknown_commands_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="unknown command"):
        command.main(arguments)


def test_saved_bytes_counts_storages_once_and_whole_and_nothing_that_was_let_go() -> None:
    x = torch.randn(100, 10, requires_grad=True)
    weight = torch.randn(10, 10, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x @ weight  # saves both, which exist anyway
        y = y - y.amax(dim=-1, keepdim=True).detach()  # saves y for a gradient that nobody wants
        z = y.exp()  # saves its output
        return z[:50] * z[:50]  # saves the same storage again, twice

    size, out = runner.saved_bytes(forward, [x, weight])
    assert size == 100 * 10 * 4
    assert out.shape == (50, 10)
    assert runner.saved_bytes(forward, [weight])[0] == 2 * 100 * 10 * 4


def test_peak_bytes_sees_what_is_freed_again() -> None:
    size = 32 << 20

    def call() -> None:
        first = torch.ones(size, dtype=torch.uint8)
        second = torch.ones(size, dtype=torch.uint8)
        del first, second

    # The kernel's counters lag behind by some pages.
    assert runner.peak_bytes(call) == pytest.approx(2 * size, rel=0.02)


def test_accuracy_is_measured_against_the_published_error() -> None:
    reference = torch.linspace(-1, 1, 100)
    published, worse = reference.bfloat16(), reference + 0.05
    assert runner.as_accurate(published, published, reference)
    assert not runner.as_accurate(worse, published, reference)


@pytest.mark.parametrize(
    ("row", "ratio", "met"),
    [
        (Row(name="time", unit="ms", old=6.0, new=2.0, goal_ratio=2.9), 3.0, True),
        (Row(name="time", unit="ms", old=6.0, new=3.0, goal_ratio=2.9), 2.0, False),
        (Row(name="rate", unit="images/s", old=100.0, new=150.0, goal=180.0), 1.5, False),
        (Row(name="share", unit="share", old=0.4, new=0.96, goal=0.95), 2.4, True),
        (Row(name="kept", unit="KiB", old=137.0, new=96.0, goal=95.0), 137 / 96, False),
        (Row(name="plain", unit="s", new=1.0), None, None),
    ],
)
def test_goals(row: Row, ratio: float | None, met: bool | None) -> None:
    assert row.ratio == (None if ratio is None else pytest.approx(ratio))
    assert row.met is met


def test_tables_show_the_same_as_text_and_markdown() -> None:
    rows = [Row(name="a", unit="ms", old=1234.5, new=0.12345, equal=True).to_dict()]
    assert table.text(rows, ["name", "old", "new", "equal"]).splitlines()[1].split() == ["a", "1234", "0.123", "yes"]
    assert table.markdown(rows, ["name", "goal"]) == "| name | goal |\n| --- | --- |\n| a |  |"


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match="format 0"):
        table.read(path)


def test_published_selection_takes_the_best_that_are_left() -> None:
    # Head 0 takes its best two, 3 and 1; head 1 wants 3 and 1 too and has to go on to 4 and 2.
    row = torch.tensor([[[9.0, 7.0, 2.0, 8.0, 1.0], [9.0, 7.0, 5.0, 8.0, 6.0]]])
    assert select(row, 5) == [[0, 1, 2, 3, 4]]
    assert select(row[:, :1], 3) == [[0, 1, 3]]


def test_published_selection_is_the_published_one(golden_root: Path) -> None:
    tensors = load_file(golden_root / "selection/selection.safetensors")
    cases = json.loads((golden_root / "selection/cases.json").read_text())
    for case in [case for case in cases if case["count"] >= case["H"]]:
        scores = tensors[f"{case['case']}.attn"]
        row = scores[:, :, 0] if case["full_matrix"] else scores
        assert select(row, case["count"] + 1) == tensors[f"{case['case']}.indices"].tolist(), case["case"]


@pytest.mark.parametrize("batch", [2, 4])
def test_published_batches_group_by_modality_and_deal_evenly(batch: int) -> None:
    lengths, world = mixture(200, seed=3), 4
    has_image = [images > 0 for images in lengths.images]
    steps = batching.grouped(lengths.words, has_image, world, batch, seed=1)
    seen = Counter(index for step in steps for share in step for index in share)
    assert max(seen.values()) == 1
    assert len(seen) == 200 - 200 % (world * batch)
    assert all(len(share) == batch for step in steps for share in step)
    mixed = [len({has_image[index] for share in step for index in share}) > 1 for step in steps]
    assert sum(mixed) <= 1 + 200 % (world * batch) // batch
    assert steps != batching.grouped(lengths.words, has_image, world, batch, seed=2)


def test_lengths_at_hand() -> None:
    counted = real()
    assert len(counted.text) == len(counted.images) == len(counted.supervised) == len(counted.words) == 992
    assert min(counted.text) > 0
    assert max(counted.positions(145)) <= 2048
    assert all(supervised < text for supervised, text in zip(counted.supervised, counted.text, strict=True))
    assert mixture(50) == mixture(50)


def test_sizes_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cpu.main(["--tiny", "--full"])
    with pytest.raises(SystemExit):
        cpu.main(["--only", "vision,everything"])
    assert "['everything']" in capsys.readouterr().err
    assert {size.value for size in Size} == {"tiny", "quick", "full"}


@pytest.mark.slow
def test_dealing_to_more_ranks_leaves_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scaling.json"
    command.main(["scaling", "--ranks", "8", "64", "--per-rank", "1", "4", "--json", str(path)])
    rows = {(row["lengths"], row["ranks"], row["per_rank"]): row for row in table.read(path)["rows"]}
    assert len(rows) == 8
    for (lengths, ranks, per_rank), row in rows.items():
        assert row["global_batch"] == ranks * per_rank
        assert 0 < row["useful"] <= 1 <= row["slowest"]
        if (ranks, per_rank) != (8, 4):
            assert row["useful"] < rows[lengths, 8, 4]["useful"], "fewer samples each, or more ranks to wait for"
    assert "useful" in capsys.readouterr().out
