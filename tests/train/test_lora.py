"""Training an adapter: only it and the connector move, it resumes to the bit, and merged it says the same."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from anchorformer.errors import UserError
from anchorformer.model_folder import derive_folder, part_state, read_index
from anchorformer.weights import check_folder, load_model
from tests.anchorformer.test_eram_v import integration, opened
from tests.conftest import Assemble
from tests.train.cases import FINETUNE, run_config
from tests.train.conftest import MakeRun, launch_again, write_run
from tests.train.ranks import Ranks
from tests.train.test_resume import record, run_until
from train import adapter, lora
from train.checkpoint import damage
from train.choices import Part
from train.config import LoraConfig
from train.distributed import alone
from train.run.folder import RunFolder
from train.stage import freeze, table
from train.verbs import merge

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": TARGETS}
RATES = {"connector": {"lr": 1e-3}, "language_model": {"lr": 2e-2}}


def tensors_of(folder: Path, part: str) -> dict[str, torch.Tensor]:
    index = read_index(folder)
    files = {file for name, file in index.items() if name.startswith(part)}
    return {name: value for file in files for name, value in load_file(folder / file).items()}


@pytest.fixture(scope="module")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def trained(_place: Path, tiny_folder: Path, tiny_data: Path) -> RunFolder:
    """A finished run with an adapter, in one process."""
    run = write_run(_place, tiny_folder, tiny_data, "lora", RATES, stage__lora=LORA, stage__max_steps=5,
                    checkpoint__every=2, log__every=1)  # fmt: skip
    run_until(alone(), str(run.path))
    return run


def test_a_run_leaves_its_adapter_and_the_merged_model(trained: RunFolder) -> None:
    lines = record(trained)
    assert all(line["part_grad_norm"]["language_model"] > 0 for line in lines)
    weights = load_file(trained.adapter / adapter.WEIGHTS)
    assert {name.split(".")[2] for name in weights} == {"connector", "language_model"}
    assert len([name for name in weights if ".lora_" in name]) == 2 * 2 * len(TARGETS)
    described = json.loads((trained.adapter / adapter.CONFIG).read_text())
    assert described["base_model_name_or_path"] == str(trained.start)
    assert described["auto_mapping"]["base_sha256"] == trained.start_hash
    check_folder(trained.model, every_hash=True)
    before, after = (tensors_of(folder, "language_model") for folder in (trained.start, trained.model))
    moved = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(TARGETS), "nothing else of the language model is another"


def test_a_checkpoint_holds_the_adapter_only(trained: RunFolder) -> None:
    newest = trained.state / "step-00000005"
    assert damage(newest, alone()) is None
    held = load_file(newest / "language_model.safetensors")
    assert held
    assert all(lora.is_adapter(name) for name in held)


def test_merge_proves_itself(trained: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    assert merge.main([str(trained.path), str(out)]) == 0
    assert "8 prompts" in capsys.readouterr().out
    assert tensors_of(out, "language_model").keys() == tensors_of(trained.model, "language_model").keys()
    proof = adapter.prove(trained.adapter, trained.start, out)
    assert proof.difference <= proof.tolerance < proof.effect / 10, "the proof would see a model without its adapter"
    with pytest.raises(UserError, match="exists already"):
        merge.main([str(trained.path), str(out)])


def test_peft_reads_and_merges_the_folder_alike(trained: RunFolder) -> None:
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(load_model(trained.start, torch.float32), str(trained.adapter))
    theirs = model.merge_and_unload().state_dict()
    for name, value in load_model(trained.model, torch.float32).state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("fault", ["another base", "damaged", "not merged"])
def test_a_merge_that_is_not_right_leaves_nothing(
    trained: RunFolder, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = tmp_path / "adapter", trained.start
    shutil.copytree(trained.adapter, folder)
    match fault:
        case "another base":
            base, message = trained.model, "another base"
        case "damaged":
            raw = bytearray((folder / adapter.WEIGHTS).read_bytes())
            raw[-1] ^= 1
            (folder / adapter.WEIGHTS).write_bytes(raw)
            message = "damaged at adapter_model"
        case "not merged":
            monkeypatch.setattr(adapter, "merge", lambda _, base, out: shutil.copytree(base, out))
            message = "does not say what the adapter says"
    with pytest.raises(UserError, match=message):
        merge.main([str(folder), str(tmp_path / "out"), f"base={base}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_what_is_no_adapter_is_refused(trained: RunFolder, make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no adapter"):
        merge.main([str(trained.model), str(tmp_path / "out")])
    with pytest.raises(UserError, match="is not done"):
        merge.main([str(make_run("open", RATES, stage__lora=LORA).path), str(tmp_path / "out")])


def test_resumes_to_the_bit(make_run: MakeRun) -> None:
    changes: dict[str, Any] = {"stage__lora": LORA, "stage__max_steps": 5, "checkpoint__every": 2}
    changes |= {"hardware__activation_checkpointing": "on"}
    whole, broken = make_run("whole", RATES, **changes), make_run("broken", RATES, **changes, resume="auto")
    run_until(alone(), str(whole.path))
    run_until(alone(), str(broken.path), stop_at=4)
    assert not broken.adapter.exists()
    run_until(alone(), str(broken.path))
    assert record(broken) == record(whole)
    ours, theirs = (load_file(run.adapter / adapter.WEIGHTS) for run in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    kept = make_run("kept", RATES, **changes | {"hardware__activation_checkpointing": "off"})
    run_until(alone(), str(kept.path))
    assert record(kept) == record(whole), "layers computed twice drop the same values"


def test_an_integration_hears_through_the_adapter_too(assemble_tiny: Assemble, tiny_data: Path, tmp_path: Path) -> None:
    """PEFT's own reading of the adapter beside the base says what the merged weights say, with the gates open."""
    start = assemble_tiny(integration=integration(layers=[1, 2]))
    gates = part_state(opened(load_model(start, torch.float32)), "integration")
    start = derive_folder(start, {"integration": gates}, tmp_path / "start")
    rates = {**RATES, "integration": {"lr": 1e-2}}
    run = write_run(tmp_path, start, tiny_data, "heard", rates, stage__lora=LORA, stage__max_steps=3)
    run_until(alone(), str(run.path))
    assert {name.split(".")[2] for name in load_file(run.adapter / adapter.WEIGHTS)} == {
        "connector", "integration", "language_model",
    }  # fmt: skip
    assert not torch.equal(
        *(tensors_of(each, "integration")["integration.projector.0.weight"] for each in (start, run.model))
    )
    proof = adapter.prove(run.adapter, run.start, run.model)
    assert proof.difference <= proof.tolerance < proof.effect / 10


def ranks_run(pair: Ranks, make_run: MakeRun, zero: int) -> None:
    changes: dict[str, Any] = {
        "engine": "deepspeed", "zero__stage": zero, "hardware__ranks": 2, "hardware__micro_batch": 1,
        "stage__lora": LORA, "stage__max_steps": 5, "checkpoint__every": 2,
    }  # fmt: skip
    whole, broken = make_run("whole", RATES, **changes), make_run("broken", RATES, **changes, resume="auto")
    pair.run(run_until, folder=str(whole.path))
    pair.run(run_until, folder=str(broken.path), stop_at=4)
    pair.run(run_until, folder=str(broken.path))
    assert record(broken) == record(whole)
    proof = adapter.prove(broken.adapter, broken.start, broken.model)
    assert proof.effect > 10 * proof.tolerance
    before, after = (tensors_of(folder, "") for folder in (broken.start, broken.model))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("vision_tower"))


@pytest.mark.slow
def test_two_ranks_under_zero_3(pair: Ranks, make_run: MakeRun) -> None:
    ranks_run(pair, make_run, zero=3)


@pytest.mark.slow
def test_two_ranks_under_zero_2(pair: Ranks, make_run: MakeRun) -> None:
    ranks_run(pair, make_run, zero=2)


@pytest.mark.slow
def test_another_zero_stage_goes_on_from_the_same_checkpoint(pair: Ranks, make_run: MakeRun) -> None:
    """Adapters are saved as whole tensors, so nothing has to be converted."""
    changes: dict[str, Any] = {
        "engine": "deepspeed", "hardware__ranks": 2, "hardware__micro_batch": 1, "stage__max_steps": 4,
        "stage__lora": LORA | {"dropout": 0.0}, "checkpoint__every": 2,
    }  # fmt: skip
    one, other = make_run("one", RATES, **changes), make_run("other", RATES, **changes, resume="auto")
    pair.run(run_until, folder=str(one.path))
    pair.run(run_until, folder=str(other.path), stop_at=4)
    launch_again(other, zero={"stage": 3})
    pair.run(run_until, folder=str(other.path))
    losses = [[line["loss"] for line in record(run)] for run in (other, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_only_the_adapter_and_the_connector_are_trained(tiny_folder: Path) -> None:
    config = run_config(RATES, stage__lora=LORA)
    model = load_model(tiny_folder, torch.float32)
    whole = sum(parameter.numel() for parameter in model.language_model.parameters())
    assert config.stage.lora is not None
    lora.add_adapter(model, config.stage.lora, seed=0, device=torch.device("cpu"))
    freeze(model, config.stage)
    rows = {row.part: row for row in table(model, config.stage)}
    assert rows[Part.vision_tower].trainable == 0
    assert rows[Part.connector].trainable == rows[Part.connector].total
    adapted = rows[Part.language_model]
    assert adapted.trainable == adapted.total - whole
    trained = {name for name, value in model.named_parameters() if value.requires_grad and "language" in name}
    assert all(lora.is_adapter(name) for name in trained)


def test_a_new_adapter_adds_nothing_and_is_the_same_everywhere(tiny_folder: Path) -> None:
    settings = LoraConfig(rank=4, alpha=8, targets=("q_proj",))
    models = [load_model(tiny_folder, torch.float32).eval() for _ in range(3)]
    for model in models[1:]:
        torch.rand(1)
        lora.add_adapter(model, settings, seed=3, device=torch.device("cpu"))
    ids = torch.tensor([[1, 5, 6, 7]])
    plain, one, other = (model(ids, attention_mask=torch.ones_like(ids)).logits for model in models)
    assert torch.equal(plain, one)
    assert torch.equal(one, other)
    ours, theirs = (dict(model.named_parameters()) for model in models[1:])
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no language model": ({"connector": {"lr": 1e-3}}, {"stage__lora": LORA}, "does not train"),
    "rank of zero": (RATES, {"stage__lora": LORA | {"rank": 0}}, "rank"),
    "no target": (RATES, {"stage__lora": LORA | {"targets": []}}, "adapts no layer"),
    "whole dropout": (RATES, {"stage__lora": LORA | {"dropout": 1.0}}, "dropout"),
    "ZeRO-3 in 4 bits": (RATES, {"stage__lora": LORA | {"quantize": True}, "engine": "deepspeed", "zero__stage": 3},
                         "do not go with ZeRO-3"),
    "CPU in 4 bits": (RATES, {"stage__lora": LORA | {"quantize": True}}, "on CUDA only"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_config(mistake: str) -> None:
    trains, changes, message = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        run_config(trains, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("target", ["query_proj", "lm_head", "embed_tokens", "mlp", "proj"])
def test_a_target_that_is_no_layer_is_named_before_ranks_start(tiny_folder: Path, target: str) -> None:
    config = run_config(FINETUNE, stage__lora=LORA | {"targets": ["q_proj", target]})
    with pytest.raises(UserError, match="do not have") as caught:
        lora.check_adapter(config, tiny_folder)
    assert caught.value.found == target
    assert "gate_proj" in caught.value.expected


class Linear4bit(torch.nn.Linear):
    """As bitsandbytes' own is made, without packing anything."""

    def __init__(self, width: int, out: int, bias: bool, compute_dtype: torch.dtype, **kinds: Any) -> None:
        super().__init__(width, out, bias=bias, device=kinds.pop("device"))
        assert kinds == {"compress_statistics": True, "quant_type": "nf4"}
        assert compute_dtype is torch.bfloat16


def packed(weight: torch.Tensor, *, requires_grad: bool, module: torch.nn.Module, **kinds: Any) -> torch.nn.Parameter:
    """Where bitsandbytes packs pairs of values, this rounds them, so that something is lost as well."""
    assert isinstance(module, Linear4bit)
    assert kinds == {"compress_statistics": True, "quant_type": "nf4"}
    return torch.nn.Parameter((weight * 64).round() / 64, requires_grad=requires_grad)


def test_layers_in_4_bits_lie_beneath_the_adapter(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for bitsandbytes, which computes on CUDA only: what is put where, and what is trained."""
    stand_in = SimpleNamespace(nn=SimpleNamespace(Linear4bit=Linear4bit, Params4bit=packed))
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    config = run_config(RATES, stage__lora=LORA)
    model = load_model(tiny_folder, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert config.stage.lora is not None
    settings = replace(config.stage.lora, quantize=True)
    lora.add_adapter(model, settings, seed=0, device=torch.device("cpu"))
    freeze(model, config.stage)
    layers = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 2 * len(TARGETS)
    assert all(name.startswith("language_model.model.layers.") for name in layers)
    for name, value in model.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if plain in before:
            is_layer = name.removesuffix(".weight") in layers
            assert torch.equal(value, before[plain]) != is_layer, name
    ids = torch.tensor([[1, 5, 6, 7]])
    model(ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    trained = {name for name, value in model.named_parameters() if value.grad is not None and "language" in name}
    assert trained
    assert all(lora.is_adapter(name) for name in trained)


@pytest.mark.parametrize(("cuda", "found"), [(False, "no CUDA device"), (True, "no such package")])
def test_what_4_bits_need_is_looked_for_before_ranks_start(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, cuda: bool, found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(lora, "find_spec", lambda _: None)
    config = run_config(RATES, stage__lora=LORA | {"quantize": True}, hardware__device="auto")
    with pytest.raises(UserError) as caught:
        lora.check_adapter(config, tiny_folder)
    assert found in caught.value.found
