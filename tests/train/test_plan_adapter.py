"""The plan of an adapter against PEFT's own modules: as many values, and as many kept bytes, as counted."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from anchorformer.errors import UserError
from anchorformer.kernels.attention import TEXT_ATTENTION
from anchorformer.lean import make_lean
from bench.runner import saved_bytes
from train.choices import Part
from train.compose import compose
from train.config import LoraConfig
from train.lora import add_adapter
from train.plan.adapter import _targets, adapter_kept, adapter_values
from train.plan.fit import GB, choose
from train.plan.shapes import read_shapes, shapes_of

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40,
}  # fmt: skip
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEXT = shapes_of(
    {"model_type": "clip_vision_model"}, {"model_type": "llama", **SIZES},
    {"_target_": "anchorformer.selectors.all.AllSelectorConfig", "layer": -2},
    {"_target_": "anchorformer.connectors.mlp.MlpConfig"},
).text  # fmt: skip


class Whole(nn.Module):
    """As much of the model as an adapter looks at."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.language_model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation=TEXT_ATTENTION)
        make_lean(self.language_model)
        self.requires_grad_(False)


@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj"), ("o_proj", "down_proj")])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_values_and_kept_bytes(targets: tuple[str, ...], dropout: float) -> None:
    lora, positions = LoraConfig(rank=8, alpha=8, dropout=dropout, targets=targets), 32
    plain = Whole().train()
    adapted = copy.deepcopy(plain)
    add_adapter(adapted, lora, seed=0, device=torch.device("cpu"))
    trained = [value for value in adapted.parameters() if value.requires_grad]
    assert adapter_values(TEXT, lora) == sum(value.numel() for value in trained)

    embeds = torch.randn(1, positions, 64, requires_grad=True)

    def kept(model: Whole) -> int:
        language_model: Any = model.language_model.model
        forward = partial(language_model, inputs_embeds=embeds, use_cache=False)
        return saved_bytes(forward, [embeds, *model.parameters()])[0]

    counted = SIZES["num_hidden_layers"] * positions * adapter_kept(TEXT, lora, 4)
    if dropout:  # on CPU the mask has the dtype of what it was laid over
        counted += SIZES["num_hidden_layers"] * positions * 3 * sum(width for width, _ in _targets(TEXT, lora))
    assert kept(adapted) - kept(plain) == pytest.approx(counted, rel=0.05)


def test_what_the_stages_of_a_7b_need() -> None:
    given = ["stage=finetune", "run=r", "data.root=/d", "experiment=paper_7b", "hardware=a100x8", "init_from=/m"]
    memory = {}
    for option in ("none", "default", "qlora"):
        config = compose([*given, f"lora={option}", "zero=zero2"])
        shapes = read_shapes(config)
        memory[option] = choose(config, shapes, limit=None).memory
    counts = shapes.parameters
    assert memory["default"].optimizer < memory["none"].optimizer / 10
    saved = (memory["default"].weights - memory["qlora"].weights) / GB
    assert saved == pytest.approx(2 * 0.74 * counts[Part.language_model] / GB, rel=0.05)


def test_a_layer_of_unknown_shape_is_told() -> None:
    with pytest.raises(UserError, match="what this adapter costs"):
        adapter_values(TEXT, LoraConfig(rank=8, alpha=8, targets=("qkv_proj",)))
