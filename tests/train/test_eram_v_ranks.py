"""eRAM-V's integration on two real ranks: gradients of one process under ZeRO, and both stages by the launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anchorformer.model_folder import derive_folder, part_state, read_index
from anchorformer.weights import check_folder, load_model
from tests.anchorformer.test_eram_v import integration, opened
from tests.conftest import ROOT, Assemble
from tests.train.cases import FINETUNE, batches_for, load_frozen, run_config
from tests.train.ranks import Ranks
from tests.train.test_gradients import assert_same
from tests.train.tiny_world import write_world
from train.distributed import World, alone
from train.engine import Engine, build_engine, loading
from train.engine import zero as door
from train.run.folder import RunFolder
from train.verbs import export

SPEC = integration(layers=[1, 2])
STAGES = {
    "align": {part: {"lr": 1e-2} for part in ("connector", "integration")},
    "finetune": {**FINETUNE, "integration": {"lr": 1e-3, "weight_decay": 0.1}},
}  # fmt: skip
DEAL = [[[0, 1, 2], [6, 7]], [[3, 4], [5]]]
"""The second rank has text only."""
STEPS = 3
"""ZeRO-3 records in which order parameters are used, and goes by that from the second step on."""


@pytest.fixture(scope="module")
def folder(assemble_tiny: Assemble, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with open gates."""
    start = assemble_tiny(integration=SPEC)
    model = opened(load_model(start, torch.float32))
    return derive_folder(
        start, {"integration": part_state(model, "integration")}, tmp_path_factory.mktemp("open") / "model"
    )


def config_of(stage: str, **changes: Any) -> Any:
    model = {"vision": "-", "language_model": "-", "selector": {}, "connector": {}, "integration": SPEC}
    return run_config(STAGES[stage], model=model, **changes)


def steps(engine: Engine, deal: list[list[int]], gradient_of: Any, count: int = STEPS) -> Any:
    """Loss, part norms and gradients of the last of a few steps."""
    for number in range(count):
        batches = batches_for(engine.model, deal, number)
        (total,) = engine.world.sum([float(sum(batch.num_supervised for batch in batches))])
        loss, norms = engine.agree(engine.accumulate(batches, int(total)))
        if number == count - 1:
            found = {
                name: gradient_of(value).clone()
                for name, value in engine.model.named_parameters()
                if value.requires_grad
            }
        engine.step()
    return loss, norms, found


def partitioned(world: World, folder: str, stage: str, zero: int) -> Engine:
    """An engine in which no parameter is kept whole because it is small."""
    config = config_of(
        stage, engine="deepspeed", zero__stage=zero, hardware__ranks=world.size, hardware__micro_batch=1,
        hardware__activation_checkpointing="on",
    )  # fmt: skip
    own = door.deepspeed_config

    def nothing_kept(*args: Any) -> dict[str, Any]:
        made = own(*args)
        made["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
        return made

    door.deepspeed_config = nothing_kept
    try:
        with loading(config, world, torch.float32):
            model = load_frozen(Path(folder), config)
        return build_engine(model, config, world, total_steps=STEPS, dtype=torch.float32)
    finally:
        door.deepspeed_config = own


def sharded(world: World, folder: str, stage: str, zero: int) -> Any:
    """What `steps` gives, of two ranks."""
    from deepspeed.utils import safe_get_full_grad

    found = steps(partitioned(world, folder, stage, zero), DEAL[world.rank], safe_get_full_grad)
    return found if world.is_main else None


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_what_one_process_learns(folder: Path, pair: Ranks, stage: str, zero: int) -> None:
    config = config_of(stage)
    engine = build_engine(load_frozen(folder, config), config, alone(), total_steps=STEPS, dtype=torch.float32)
    one_process = steps(engine, [list(range(8))], lambda value: value.grad)
    assert all(value.any() for name, value in one_process[2].items() if name.startswith("integration."))
    assert_same(pair.run(sharded, folder=str(folder), stage=stage, zero=zero)[0], one_process)


def answered(world: World, folder: str) -> Any:
    """Answers under ZeRO-3 between two steps, with cache and without; the ranks ask about images of their own."""
    engine = partitioned(world, folder, "finetune", 3)
    steps(engine, DEAL[world.rank], lambda value: torch.empty(0), 1)
    model: Any = engine.model.eval()
    ids = torch.tensor([[1, *[model.image_token_id] * model.num_image_tokens, 9 + world.rank]])
    pixels = torch.full((1, 3, 28, 28), 90 * world.rank, dtype=torch.uint8)
    with torch.no_grad():
        found = [
            model.generate(
                input_ids=ids, pixel_values=pixels, max_new_tokens=4, do_sample=False, eos_token_id=None,
                use_cache=use_cache, synced_gpus=True,
            ).tolist()
            for use_cache in (True, False)
        ]  # fmt: skip
    loss, *_ = steps(engine, DEAL[world.rank], lambda value: torch.empty(0), 1)
    return found, loss


@pytest.mark.slow
def test_ranks_answer_while_they_train(folder: Path, pair: Ranks) -> None:
    for (with_cache, without), loss in pair.run(answered, folder=str(folder)):
        assert with_cache == without
        assert loss > 0


def command(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "train", *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def part_of(folder: Path, part: str) -> dict[str, torch.Tensor]:
    files = {file for name, file in read_index(folder).items() if name.startswith(f"{part}.")}
    return {name: value for file in files for name, value in load_file(folder / file).items()}


@pytest.mark.slow
def test_both_stages_by_the_launcher(tiny_backbones: Path, tmp_path: Path) -> None:
    shared = [
        *write_world(tmp_path, tiny_backbones)[1:], "integration=eram_v", "model.integration.layers=[1,2]",
        "hardware.ranks=2", "stage.global_batch=2", "stage.epochs=null", "stage.max_steps=3", "data.num_workers=0",
        "stage.warmup_ratio=0",
    ]  # fmt: skip
    said = command("stage=align", *shared, "run=align", "zero=zero2")
    align = RunFolder(tmp_path / "checkpoints" / "align")
    assert "integration" in said, "the table of parts has its row"
    assert align.read_config().stage.trains.keys() == {"connector", "integration"}
    moved = {
        part
        for part in ("vision_tower", "connector", "integration", "language_model")
        for name, value in part_of(align.start, part).items()
        if not torch.equal(value, part_of(align.model, part)[name])
    }
    assert moved == {"connector", "integration"}
    assert part_of(align.model, "integration").keys() == part_of(align.start, "integration").keys()
    state = align.state / "step-00000003"
    assert load_file(state / "integration.safetensors").keys() == part_of(align.start, "integration").keys()
    moments = load_file(state / "optimizer.safetensors")
    assert moments["exp_avg.integration.cross_gate.value_L"].any()

    assert export.main([str(align.path), str(tmp_path / "connector"), "what=connector"]) == 0
    described = json.loads((tmp_path / "connector" / "connector.json").read_text())
    assert described["integration"]["layers"] == [1, 2]
    assert "EramV" in (tmp_path / "connector" / "README.md").read_text()

    command("stage=finetune", *shared, "run=finetune", f"init_from={align.path}", "zero=zero3")
    finetune = RunFolder(tmp_path / "checkpoints" / "finetune")
    spec = integration(layers=[1, 2])
    check_folder(finetune.model, integration=spec, every_hash=True)
    assert any(value.any() for value in part_of(finetune.model, "integration").values())
    assert export.main([str(finetune.path), str(tmp_path / "exported"), "dtype=fp32"]) == 0
    first, second = (load_model(each, torch.float32).eval() for each in (finetune.model, tmp_path / "exported"))
    ids = torch.tensor([[1, *[first.image_token_id] * first.num_image_tokens, 9, 11]])
    pixels = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)
    answers = [
        model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=4, do_sample=False)
        for model in (first, second)
    ]
    assert torch.equal(*answers)
