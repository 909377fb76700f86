"""What the plan counts of an integration, against the modules, torch's FLOP counter and tensors that are kept."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.integrations.base import Placed, Rows
from anchorformer.integrations.eram_v import Context, EramVConfig
from anchorformer.kernels import attention
from anchorformer.lean import make_lean
from anchorformer.schema import plugin_to_plain
from tests.anchorformer.test_eram_v import integration
from tests.conftest import Assemble
from tests.train.cases import FINETUNE, batches_for, load_frozen, run_config
from tests.train.test_plan_memory import (
    ANCHOR,
    ANCHOR_FORMER,
    ATTENTION_ON_CPU,
    BF16,
    CLIP_L,
    VICUNA_7B,
    WITHIN,
    an_activation,
    kept_bytes,
    on_cpu,
)
from tests.train.test_plan_shapes import paper
from train.choices import Part
from train.loss import supervised_loss
from train.plan.connectors import Surroundings
from train.plan.course import Assumptions
from train.plan.flops import Work, forward_flops, model_flops, recomputed_flops
from train.plan.integrations import integration_shape
from train.plan.memory import Layout, MicroBatch, rank_memory
from train.plan.shapes import Shapes, read_shapes, shapes_of
from train.plan.table import plan_stage, render

ERAM_V = EramVConfig(layers=(8, 9, 10))


def shapes(config: EramVConfig | None = ERAM_V) -> Shapes:
    spec = None if config is None else plugin_to_plain(config)
    return shapes_of(CLIP_L, VICUNA_7B, ANCHOR, plugin_to_plain(ANCHOR_FORMER), integration=spec)


@pytest.mark.parametrize("config", [ERAM_V, EramVConfig(layers=(1,), hidden_width=512, inject=False)])
def test_it_has_as_many_parameters_as_counted(config: EramVConfig) -> None:
    text: Any = SimpleNamespace(model_type="llama", num_hidden_layers=32, hidden_size=4096)
    with torch.device("meta"):
        module = config.build(1024, text, 145, 145)
    assert shapes(config).parameters[Part.integration] == sum(value.numel() for value in module.parameters())


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_arithmetic_is_what_torch_counts(assemble_tiny: Assemble, stage: str) -> None:
    """Of a whole step in which all samples are as long as the longest, so that attention's rectangle has no padding."""
    trains = {"integration": {"lr": 1e-3}, **FINETUNE}
    if stage == "align":
        del trains["language_model"]
    spec = integration(layers=[1, 2])
    config = run_config(trains, model={"vision": "-", "language_model": "-", "selector": {}, "connector": {},
                                       "integration": spec})  # fmt: skip
    model: Any = load_frozen(assemble_tiny(integration=spec), config).train()
    (batch,) = batches_for(model, [[0, 0, 0, 0]])
    on_cpu_too = {ATTENTION_ON_CPU: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=on_cpu_too) as counter:
        supervised_loss(model, batch, batch.num_supervised)
    parts, length = model.config, batch.num_tokens // 4
    size = shapes_of(
        parts.vision_config.to_dict(), parts.text_config.to_dict(), parts.selector, parts.connector,
        integration={"hidden_width": None, "inject": True, **spec},
    )  # fmt: skip
    work = Work(
        positions=4 * length, squares=4 * length**2, supervised=batch.num_supervised, images=4, looks=4 * length
    )
    assert sum(forward_flops(size, work).values()) == pytest.approx(counter.get_total_flops(), rel=0.03)
    with counter:
        supervised_loss(model, batch, batch.num_supervised).backward()
    assert sum(model_flops(size, config.stage.trains, work).values()) == pytest.approx(
        counter.get_total_flops(), rel=0.1
    )
    without = Work(positions=1, squares=1, supervised=0, images=0)
    assert recomputed_flops(size, without) > recomputed_flops(shapes_of(
        parts.vision_config.to_dict(), parts.text_config.to_dict(), parts.selector, parts.connector
    ), without)  # fmt: skip


@pytest.mark.parametrize("is_trained", [False, True], ids=["frozen", "trained"])
def test_what_a_layer_of_7b_keeps(is_trained: bool) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    positions, tokens, config = 16, 40, LlamaConfig(attn_implementation=attention.TEXT_ATTENTION)
    layer: Any = on_cpu(lambda: LlamaDecoderLayer(config, 0), is_trained)
    make_lean(layer)
    normed, said = an_activation(1, positions, 4096), an_activation(1, tokens, 4096)
    cross_L = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    here = torch.zeros(1, 1, dtype=torch.int64)
    rows = Rows(positions, 0, torch.tensor([0, positions], dtype=torch.int32), positions)
    context = Context(Placed(said, here, here), rows, cross_L, None, None)
    kept = kept_bytes(layer, lambda: context.looked(0, layer, normed))
    kept -= said.nbytes  # once, whatever the number of layers
    kept -= normed.nbytes * is_trained  # which the layer's own attention keeps
    size = shapes().integration
    assert size is not None
    looking = replace(size, tokens=tokens)
    assert looking.kept(shapes().text, BF16, positions, 1, trained=is_trained) == pytest.approx(kept, rel=WITHIN)


def test_what_its_own_modules_keep_and_compute() -> None:
    text: Any = SimpleNamespace(model_type="llama", num_hidden_layers=32, hidden_size=4096)
    module = on_cpu(lambda: ERAM_V.build(1024, text, 145, 145), True)
    media = torch.ones(1, 37, 1024, dtype=torch.bfloat16)
    seen = Anchors(media[:, :9].clone(), None), VisionFeatures(media, None, True)
    size = integration_shape(
        plugin_to_plain(ERAM_V), Surroundings(anchors=9, tokens=37, patches=36, vision=1024, text=4096)
    )
    kept = kept_bytes(module, lambda: module(*seen))
    # What it says is kept by those that read it.
    assert BF16 * (size.values - (37 + 9) * 4096) == pytest.approx(kept, rel=WITHIN)
    with FlopCounterMode(display=False) as counter:
        module(*seen)
    assert size.flops == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_it_is_in_the_plan_of_a_run() -> None:
    plain, with_it = paper("align", "hardware=a100x8"), paper("align", "hardware=a100x8", "integration=eram_v")
    assert with_it.stage.trains[Part.integration] == with_it.stage.trains[Part.connector]
    size = read_shapes(with_it)
    assert size.parameters[Part.integration] == 1025 * 4096 + 4097 * 4096 + 2 * 13
    plan = plan_stage(with_it)
    assert f"{'integration':<16}{size.parameters[Part.integration]:>16,}" in render(plan, Assumptions(mfu=0.4))
    batch = MicroBatch(positions=4096, supervised=100, images=16)
    for checkpointing in (False, True):
        layout = Layout(ranks=8, zero=2, value_bytes=BF16, checkpointing=checkpointing, bucket=1, buckets=1)
        less, more = (
            rank_memory(read_shapes(run), run.stage.whole_parts, layout, batch).activations for run in (plain, with_it)
        )
        assert more > less
