"""Every preset of hardware and ZeRO with both published sizes: it composes, plans, and builds at its true shapes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.errors import UserError
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from data.overrides import options
from train.choices import Part
from train.compose import compose
from train.config import RunConfig
from train.lora import add_adapter
from train.plan.memory import value_counts
from train.plan.shapes import read_shapes
from train.plan.table import plan_stage
from train.stage import freeze, table
from train.verbs import plan

CARDS = ("rtx4090x1", "a100x1", "a100_40gbx8", "a100x8", "a100x8_2nodes", "a100x8_8nodes")
MODELS, STAGES = ("paper_7b", "paper_13b"), ("align", "finetune")
PUBLISHED = {"align": 256, "finetune": 128}
QLORA = ("lora=qlora", "stage.trains.language_model.lr=2e-4", "zero=zero2")
FITS_NOT = {
    ("rtx4090x1", "paper_7b", "finetune"): ("zero=zero2_offload", "lora=qlora", "8 ranks with zero=zero3"),
    ("rtx4090x1", "paper_13b", "align"): ("zero=zero3_offload", "2 ranks with zero=zero3"),
    ("rtx4090x1", "paper_13b", "finetune"): ("zero=zero3_offload", "lora=qlora", "16 ranks with zero=zero3"),
    ("a100x1", "paper_7b", "finetune"): ("zero=zero2_offload", "lora=qlora", "2 ranks with zero=zero3"),
    ("a100x1", "paper_13b", "finetune"): ("zero=zero2_offload", "lora=qlora", "4 ranks with zero=zero3"),
}
"""What a preset alone cannot do, and what each of its remedies begins with."""


@functools.cache
def composed(hardware: str, model: str, stage: str, *more: str) -> RunConfig:
    return compose([
        f"stage={stage}", f"experiment={model}", f"hardware={hardware}", "data.root=/d", "init_from=/m", *more
    ])  # fmt: skip


def test_the_presets_are_these() -> None:
    assert set(options("hardware")) == {*CARDS, "cpu", "one_gpu"}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("hardware", CARDS)
def test_a_preset_fits_or_says_what_would(hardware: str, model: str, stage: str, capsys: Any) -> None:
    config = composed(hardware, model, stage)
    assert config.stage.global_batch == PUBLISHED[stage], "whatever the cards"
    words = [f"stage={stage}", f"experiment={model}", f"hardware={hardware}"]
    expected = FITS_NOT.get((hardware, model, stage))
    if expected is None:
        assert plan.main(words) == 0
        assert "fits: yes" in capsys.readouterr().out
        return
    with pytest.raises(UserError, match="does not fit") as caught:
        plan.main(words)
    remedies = caught.value.remedy.split("; or ")
    assert "fits: no" in capsys.readouterr().out
    for start in expected:
        (remedy,) = (remedy for remedy in remedies if remedy.startswith(start))
        if " ranks " not in remedy:
            assert plan_stage(composed(hardware, model, stage, *remedy.split())).choice.fits, remedy


@pytest.mark.parametrize("model", MODELS)
def test_one_small_card_finetunes_by_an_adapter(model: str) -> None:
    made = plan_stage(composed("rtx4090x1", model, "finetune", *QLORA))
    assert made.choice.fits
    assert made.config.stage.global_batch == 128


@pytest.mark.slow
@pytest.mark.parametrize("zero", [name for name in options("zero") if name not in ("zero0", "zero1")])
@pytest.mark.parametrize("model", MODELS)
def test_two_nodes_fit_under_every_zero(zero: str, model: str) -> None:
    more = ["zero.nvme_path=/nvme"] if "nvme" in zero else []
    for stage in STAGES:
        assert plan_stage(composed("a100x8_2nodes", model, stage, f"zero={zero}", *more)).choice.fits


@functools.cache
def built(model: str) -> AnchorFormerForConditionalGeneration:
    """The whole model at its true shapes, without memory."""
    made = composed("a100x8", model, "align").model
    vision, text = ({**made.published[name]} for name in (made.vision, made.language_model))
    config = AnchorFormerConfig(
        vision_config=vision, text_config=text, image_token_id=text["vocab_size"] - 1, selector=made.selector,
        connector=made.connector,
    )  # fmt: skip
    with torch.device("meta"):
        return AnchorFormerForConditionalGeneration(config)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_model_that_was_planned(model: str, stage: str) -> None:
    whole = built(model)
    for hardware in CARDS:
        config = composed(hardware, model, stage)
        freeze(whole, config.stage)
        rows = {row.part: row for row in table(whole, config.stage)}
        shapes = read_shapes(config)
        assert {part: row.total for part, row in rows.items()} == shapes.parameters
        assert all(row.trainable == (row.total if row.part in config.stage.trains else 0) for row in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_its_adapter_is_the_one_that_was_planned(model: str) -> None:
    config = composed("rtx4090x1", model, "finetune", "lora=default", *QLORA[1:])
    assert config.stage.lora is not None
    whole = built(model).requires_grad_(False)
    with torch.device("meta"):
        add_adapter(whole, config.stage.lora, seed=0, device=torch.device("meta"))
    freeze(whole, config.stage)
    trained = sum(row.trainable for row in table(whole, config.stage))
    built.cache_clear()  # it is another model now
    assert trained == value_counts(read_shapes(config), config.stage.whole_parts, config.stage.lora)[1]
    assert Part.language_model not in config.stage.whole_parts
