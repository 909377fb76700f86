"""The GPU benchmarks, at toy sizes on the CPU: that rungs are honest, ranks emulated right, and every command runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from anchorformer.errors import UserError
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from bench.gpu import as_published, ladder, run, shapes
from bench.gpu.emulate import EmulatedRank, run_step
from bench.gpu.session import Session, parser
from bench.lengths import FILE
from data.collate import collate
from train.loss import supervised_loss
from train.run.folder import RunFolder

SCALE = shapes.tiny_scale()
LENGTHS = [
    shapes.Length(text=5, supervised=3),
    shapes.Length(text=12, supervised=7),
    shapes.Length(text=8, supervised=1),
]
ABSENT = ("deepspeed", "liger_kernel", "flash_attn", "hydra", "omegaconf", "datasets")
"""What a rented machine may not have."""


@pytest.fixture(scope="module")
def model() -> AnchorFormerForConditionalGeneration:
    return shapes.build_model(SCALE, "anchor_former", shapes.build_language_model(SCALE)).train()


def test_rungs_differ_in_one_switch_each() -> None:
    ladder_rungs = [astuple(switches) for _, switches in ladder.rungs()]
    assert not any(ladder_rungs[0])
    assert all(ladder_rungs[-1])
    for lower, upper in pairwise(ladder_rungs):
        assert sum(a != b for a, b in zip(lower, upper, strict=True)) == 1


@pytest.mark.parametrize(("stage", "name"), [(1, "captions"), (2, "counted"), (2, "mixture")])
def test_both_samplers_deal_the_same_samples(stage: int, name: str) -> None:
    lengths = shapes.read_lengths(FILE, tiny=False)[stage][name]
    samples = ladder.draw(stage, lengths, 145, 16)
    published = Counter(number for share in samples.published for number in share)
    dealt = Counter(number for share in samples.dealt for micro in share for number in micro)
    assert published == dealt == Counter(range(ladder.RANKS * 16))
    assert all(length.images for length in samples.lengths)
    assert samples.padded_share < samples.packed_share <= 1


def test_the_padded_step_is_the_flat_one(model: AnchorFormerForConditionalGeneration) -> None:
    examples = shapes.make_examples(model, LENGTHS)
    flat, padded = collate(examples), as_published.collate_padded(examples)
    steps = [
        lambda: supervised_loss(model, flat, 11),
        lambda: as_published.padded_loss(model, padded, 11, all_logits=False),
        lambda: as_published.padded_loss(model, padded, 11, all_logits=True),
    ]
    results = []
    for step in steps:
        loss = step()
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
        model.zero_grad(set_to_none=True)
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=0)
        assert torch.dist(gradient, results[0][1]) < 1e-5 * results[0][1].norm()


def test_an_emulated_rank_sums_its_share_and_leaves_the_model_as_it_was(
    model: AnchorFormerForConditionalGeneration,
) -> None:
    batch = collate(shapes.make_examples(model, LENGTHS))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rank = EmulatedRank(model, shapes.stage_config(2), 8)
    supervised_loss(model, batch, 11).backward()
    supervised_loss(model, batch, 11).backward()
    shares = {mine.data_ptr(): total.clone() for mine, _, total in rank._shares}
    assert all(parameter.grad is None for parameter in model.parameters())
    run_step(rank, [lambda: supervised_loss(model, batch, 11)])
    assert not any(total.any() for _, _, total in rank._shares)
    rank.close()

    supervised_loss(model, batch, 11).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == len(shares)
    for parameter in trained:
        share = shares[parameter.data_ptr()]
        assert share.numel() == -(-parameter.numel() // 8)
        assert parameter.grad is not None
        torch.testing.assert_close(share, 2 * parameter.grad.flatten()[: share.numel()], rtol=1e-4, atol=1e-8)
    model.zero_grad(set_to_none=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_row_that_fails_costs_only_itself(tmp_path: Path) -> None:
    options = parser("test", None).parse_args(["--tiny", "--json", str(tmp_path / "rows.json")])
    session = Session("test", options)

    def fail() -> dict[str, float]:
        raise RuntimeError("planted")

    def run_out() -> dict[str, float]:
        raise torch.OutOfMemoryError("planted")

    assert session.row({"what": "a"}, 1, fail) is None
    assert session.row({"what": "b"}, 1, run_out) is None
    assert session.row({"what": "c"}, 10_000, fail) is None
    assert session.row({"what": "d"}, 1, lambda: {"ms": 1.0}) == {"ms": 1.0}
    with pytest.raises(ExceptionGroup, match="1 row"):
        session.close()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [str(row["left_out"]).split(":")[0] for row in rows] == ["failed", "out of memory", "time budget", "None"]


def test_a_run_on_several_cards_is_summed_up_from_its_metrics(tmp_path: Path) -> None:
    times = [{"seconds": s, "samples_per_second": 256 / s, "tokens_per_second": 9e3 / s, "data_wait_seconds": 0.1,
              "peak_memory_gib": 30 + s} for s in (9.0, 1.0, 2.0, 4.0)]  # fmt: skip
    lines = [json.dumps({"time": time, "padding_share": 0.1}) + "\n" for time in times]
    RunFolder(tmp_path).metrics.write_text("".join(lines))
    found = run.summary(tmp_path, warm_up=1)
    assert (found["steps"], found["step_s"], found["samples_s"], found["peak_gib"]) == (3, 2.0, 128.0, 34.0)
    with pytest.raises(UserError, match="no steps"):
        run.summary(tmp_path, warm_up=4)


@pytest.mark.slow
def test_every_command_runs_without_what_a_rented_machine_lacks(tmp_path: Path) -> None:
    commands = {
        "micro": [], "step": ["--tiles", "1", "--connectors", "mlp,anchor_former"],
        "ladder": ["--distributions", "counted"],
    }  # fmt: skip
    program = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
import torch
torch.set_num_threads(1)
from bench.gpu import ladder, micro, step
for name, options in {commands!r}.items():
    globals()[name].main([*options, "--tiny", "--json", f"{tmp_path}/{{name}}.json"])
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, cwd=FILE.parents[1])
    sheets = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in commands}
    for name, sheet in sheets.items():
        assert sheet["rows"], name
        assert [row for row in sheet["rows"] if row["left_out"]] == []
    for row in sheets["micro"]["rows"]:
        assert row.get("equal", True)
        assert (row.get("error") or 0.0) < 2e-6, row
    losses = [row["loss"] for row in sheets["ladder"]["rows"]]
    assert len(losses) == len(ladder.rungs())
    assert max(losses) - min(losses) < 1e-5 * losses[0]
