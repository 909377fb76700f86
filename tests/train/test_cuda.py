"""On a CUDA device (`make test-gpu`): engines, packing, generation and both stages from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorformer.devices import Device
from anchorformer.weights import load_model
from data.collate import collate
from tests.train.cases import ALIGN, FINETUNE, batches_for, examples_for, filler_for, load_frozen, run_config
from tests.train.ranks import Ranks
from tests.train.tiny_world import write_world
from train.compose import ROOT
from train.distributed import World, alone
from train.engine import Engine, build_engine, loading
from train.run.fingerprint import fingerprint

pytestmark = pytest.mark.gpu

WHOLE = [[0, 1, 2, 3, 4, 5, 6, 7]]
QUARTERS = [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Ranks]:
    """One rank on the first CUDA device, joined by NCCL."""
    ranks = Ranks(1, Device.cuda)
    yield ranks
    ranks.close()


def start(world: World, folder: str, engine: str, zero: int, dtype: torch.dtype, trains: dict[str, Any]) -> Engine:
    config = run_config(
        trains, engine=engine, zero__stage=zero, zero__overlap_comm=True, hardware__micro_batch=1,
        hardware__device=world.device.type, stage__eps=1e-2, stage__clip_norm=0.5,
    )  # fmt: skip
    with loading(config, world, dtype):
        model = load_frozen(Path(folder), config, dtype)
    return build_engine(model, config, world, total_steps=4, dtype=dtype)


def steps(world: World, folder: str, engine: str, zero: int, bf16: bool, deal: list[list[int]]) -> Any:
    """Losses and gradient norms of three steps."""
    machine = start(world, folder, engine, zero, torch.bfloat16 if bf16 else torch.float32, FINETUNE)
    numbers = []
    for seed in range(3):
        batches = batches_for(machine.model, deal, seed)
        loss, norms = machine.agree(machine.accumulate(batches, sum(batch.num_supervised for batch in batches)))
        numbers += [loss, *norms.values()]
        machine.step()
    return numbers


def test_fp32_steps_agree_with_the_cpu(one_rank: Ranks, tiny_folder: Path) -> None:
    case = {"folder": str(tiny_folder), "engine": "plain", "zero": 0, "bf16": False, "deal": WHOLE}
    expected = steps(alone(), **case)
    (found,) = one_rank.run(steps, **case)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_steps_agree_with_the_plain_engine(one_rank: Ranks, tiny_folder: Path, zero: int) -> None:
    """In fp32, where only the order of sums differs; four micro-batches under ZeRO against one without."""
    (expected,) = one_rank.run(steps, folder=str(tiny_folder), engine="plain", zero=0, bf16=False, deal=WHOLE)
    (found,) = one_rank.run(steps, folder=str(tiny_folder), engine="deepspeed", zero=zero, bf16=False, deal=QUARTERS)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("zero", [2, 3])
def test_bf16_accumulates_in_fp32(one_rank: Ranks, tiny_folder: Path, zero: int) -> None:
    """Micro-batches summed under overlapped reduction equal the plain engine's fp32 sum of the same micro-batches."""
    case = {"folder": str(tiny_folder), "bf16": True, "deal": QUARTERS}
    (expected,) = one_rank.run(steps, engine="plain", zero=0, **case)
    (found,) = one_rank.run(steps, engine="deepspeed", zero=zero, **case)
    # The first loss and norms come from the same weights: the same bf16 gradients, added in fp32 by both.
    assert found[:3] == pytest.approx(expected[:3], rel=1e-3)
    assert found == pytest.approx(expected, rel=3e-2)


def frozen_and_saved(world: World, folder: str, out: str, zero: int) -> Any:
    """Fingerprints before and after align steps, of what was saved and what a fresh engine reads."""
    machine = start(world, folder, "deepspeed", zero, torch.bfloat16, ALIGN)
    before = fingerprint(machine.values())
    for seed in range(3):
        batches = batches_for(machine.model, QUARTERS, seed)
        machine.accumulate(batches, sum(batch.num_supervised for batch in batches))
        machine.step()
    target = Path(out) / f"step{zero}"
    target.mkdir()
    machine.save(target)
    after = fingerprint(machine.values())
    fresh = start(world, folder, "deepspeed", zero, torch.bfloat16, ALIGN)
    fresh.load(target)
    return before, after, fingerprint(fresh.values())


@pytest.mark.parametrize("zero", [2, 3])
def test_frozen_stay_and_state_survives_to_the_bit(
    one_rank: Ranks, tiny_folder: Path, tmp_path: Path, zero: int
) -> None:
    [(before, after, read)] = one_rank.run(frozen_and_saved, folder=str(tiny_folder), out=str(tmp_path), zero=zero)
    assert after == read
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith("connector.")}


def test_packed_logits_equal_separate_ones(tiny_folder: Path) -> None:
    """In bf16 the error against fp32 on the CPU is at most twice that of each sample by itself."""
    reference = load_model(tiny_folder, torch.float32).eval()
    model = load_model(tiny_folder, torch.bfloat16).eval().cuda()
    examples, filler = examples_for(model), filler_for(model)

    def logits(module: Any, numbers: list[int]) -> torch.Tensor:
        batch = collate([examples[number] for number in numbers], filler).to(module.device)
        with torch.no_grad():
            out = module(
                input_ids=batch.input_ids_S[None], position_ids=batch.position_ids_S[None],
                cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, pixel_values=batch.tiles_B3HW,
            )  # fmt: skip
        return out.logits[0].float().cpu()

    expected = torch.cat([logits(reference, [number]) for number in WHOLE[0]])
    separate = torch.cat([logits(model, [number]) for number in WHOLE[0]])
    packed = logits(model, WHOLE[0])
    assert (packed - expected).abs().max() <= 2 * (separate - expected).abs().max()


def test_generation_agrees_with_the_cpu(tiny_folder: Path) -> None:
    cpu = load_model(tiny_folder, torch.float32).eval()
    cuda = load_model(tiny_folder, torch.float32).eval().cuda()
    examples = [example for example in examples_for(cpu) if len(example.tiles_B3HW)]
    for example in examples:
        inputs = {
            "input_ids": example.input_ids_S[None], "attention_mask": torch.ones_like(example.input_ids_S[None]),
            "pixel_values": example.tiles_B3HW,
        }  # fmt: skip
        expected = cpu.generate(**inputs, max_new_tokens=8, do_sample=False)
        found = cuda.generate(
            **{name: value.cuda() for name, value in inputs.items()}, max_new_tokens=8, do_sample=False
        )
        assert found.cpu().tolist() == expected.tolist()


def test_both_stages_through_the_launch_script(tiny_backbones: Path, tmp_path: Path) -> None:
    """launch/one_gpu.sh: align, finetune from it, in bf16 under DeepSpeed, down to DONE and a model folder."""
    world = [item for item in write_world(tmp_path, tiny_backbones) if not item.startswith(("stage=", "hardware="))]
    short = ["stage.global_batch=2", "hardware.micro_batch=2", "stage.epochs=null", "stage.max_steps=4"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for stage, more in (("align", []), ("finetune", [f"init_from={tmp_path}/checkpoints/align"])):
        done = subprocess.run(
            ["launch/one_gpu.sh", f"stage={stage}", *world, *short, *more, f"run={stage}"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        folder = tmp_path / "checkpoints" / stage
        assert (folder / "DONE").is_file()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 4
        assert "cuda" in (folder / "logs" / "rank_0.log").read_text()
