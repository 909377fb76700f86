"""Ways of computing that may change speed and memory, and no number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorformer.errors import UserError
from tests.train.cases import ALIGN, FINETUNE, batches_for, load_frozen, run_config
from train.choices import Part
from train.compute import set_computation
from train.loss import supervised_loss


def step(
    folder: Path, trains: dict[str, Any], training: bool = True, **hardware: Any
) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, and how many layers of the language model ran."""
    config = run_config(trains, **{f"hardware__{name}": value for name, value in hardware.items()})
    model: Any = load_frozen(folder, config).train(training)
    set_computation(model, config.hardware)
    runs = []
    for layer in model.language_model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    (batch,) = batches_for(model, [range(8)])
    loss = supervised_loss(model, batch, batch.num_supervised)
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return float(loss.detach()), gradients, len(runs)


@pytest.mark.parametrize("trains", [ALIGN, FINETUNE], ids=["align", "finetune"])
def test_checkpointing_changes_no_bit(tiny_folder: Path, trains: dict[str, Any]) -> None:
    loss, gradients, runs = step(tiny_folder, trains, activation_checkpointing="off")
    again, others, more = step(tiny_folder, trains, activation_checkpointing="on")
    assert more == 2 * runs, "every layer runs a second time, and only in backward"
    assert loss == again
    assert gradients.keys() == others.keys()
    assert {name.split(".")[0] for name in gradients} == set(trains)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_checkpointing_is_for_training_only(tiny_folder: Path) -> None:
    assert (
        step(tiny_folder, FINETUNE, training=False, activation_checkpointing="on")[2] == step(tiny_folder, FINETUNE)[2]
    )


def test_compiled_parts_keep_their_names(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    config = run_config(ALIGN, hardware__compile=["vision_tower", "connector"])
    model = load_frozen(tiny_folder, config)
    before = list(model.state_dict())
    set_computation(model, config.hardware)
    assert len(compiled) == 2
    assert list(model.state_dict()) == before
    with pytest.raises(UserError, match="ZeRO-3"):
        replace(config, zero=replace(config.zero, stage=3))
    assert config.hardware.compile == (Part.vision_tower, Part.connector)


@pytest.mark.slow
def test_compiled_parts_give_the_same_gradients(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    loss, gradients, _ = step(tiny_folder, ALIGN)
    again, others, _ = step(tiny_folder, ALIGN, compile=["vision_tower", "connector"])
    assert again == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-6)
