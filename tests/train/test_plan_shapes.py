"""Sizes that the plan reads and arithmetic that it counts, against the modules themselves and published figures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from anchorformer.contracts import VisionNeeds
from anchorformer.errors import UserError
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.schema import parse_plugin
from anchorformer.selectors.base import PACKAGE, SelectorConfig
from anchorformer.vision import VisionTower
from data.overrides import CONF
from tests.train.cases import ALIGN, EVERYTHING, FINETUNE, batches_for, load_frozen, run_config
from train.choices import Part
from train.compose import compose
from train.loss import supervised_loss
from train.plan.flops import Work, forward_flops, model_flops, recomputed_flops
from train.plan.shapes import TEXT_DEFAULTS, VISION_DEFAULTS, read_shapes, shapes_of

ANCHOR = {"_target_": "anchorformer.selectors.anchor.AnchorSelectorConfig", "layer": -2, "num_anchors": 145}
ALL = {"_target_": "anchorformer.selectors.all.AllSelectorConfig", "layer": -3}
MLP = {"_target_": "anchorformer.connectors.mlp.MlpConfig"}
SMALL = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
LLAMA = {"model_type": "llama"}


def paper(stage: str = "align", *more: str) -> Any:
    return compose([f"stage={stage}", "experiment=paper_7b", "data.root=/d", "init_from=/m", *more])


@pytest.mark.parametrize("family", VISION_DEFAULTS)
def test_towers_have_as_many_parameters_as_counted(family: str) -> None:
    sizes = {**SMALL, **({"mlp_ratio": 3} if family.startswith("dino") else {"intermediate_size": 80})}
    config = AutoConfig.for_model(family, **sizes)
    with torch.device("meta"):
        tower = VisionTower.from_config(config, VisionNeeds(layer=-3))
    shape = shapes_of({"model_type": family, **sizes}, LLAMA, ALL, MLP).vision
    assert shape.parameters == sum(value.numel() for value in tower.parameters())
    assert (shape.tokens, shape.has_cls, shape.layers) == (tower.num_tokens, tower.has_cls, 2)
    assert shape.attended == shape.tokens + tower.num_registers


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "selector").glob("*.yaml")))
def test_selectors_need_as_many_blocks_and_give_as_many_anchors_as_counted(name: str) -> None:
    selector = compose(["stage=align", f"selector={name}", "run=r", "data.root=/d", "init_from=/m"]).model.selector
    config = parse_plugin(SelectorConfig, selector, PACKAGE, name)
    vision = {"model_type": "clip_vision_model", **SMALL, "image_size": 336, "intermediate_size": 80}
    with torch.device("meta"):
        tower = VisionTower.from_config(AutoConfig.for_model(**vision), config.needs)
    size = shapes_of(vision, LLAMA, selector, MLP)
    count = config.count(tower.num_tokens, tower.num_heads, tower.has_cls)
    expected = round(count * selector["expected_share"]) if config.ragged else count
    assert (size.connector.queries, size.most_anchors) == (expected, count if config.ragged else None)
    assert size.vision.layers == tower.num_layers
    assert size.vision.parameters == sum(value.numel() for value in tower.parameters())


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"num_key_value_heads": 2, "head_dim": 24}), ("qwen2", {"num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 24}), ("qwen3", {}),
    ],
)  # fmt: skip
def test_language_models_have_as_many_parameters_as_counted(family: str, more: dict[str, Any]) -> None:
    sizes = {
        "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 300, **more,
    }  # fmt: skip
    if family != "mistral":
        sizes.setdefault("num_key_value_heads", 4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    clip = {"model_type": "clip_vision_model"}
    shape = shapes_of(clip, {"model_type": family, **sizes}, ALL, MLP).text
    assert shape.parameters == sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize("family", [*VISION_DEFAULTS, *TEXT_DEFAULTS])
def test_defaults_are_those_of_transformers(family: str) -> None:
    theirs = AutoConfig.for_model(family).to_dict()
    for name, value in {**VISION_DEFAULTS, **TEXT_DEFAULTS}[family].items():
        assert value is None or theirs[name] == value, name


def test_the_paper_s_model(golden_root: Path) -> None:
    size = read_shapes(paper())
    counts = json.loads((golden_root / "params" / "param_counts.json").read_text())
    stack = {row["depth"]: row["without_latents"] for row in counts["table"]}
    assert size.parameters[Part.connector] == stack[6] + counts["mlp2x_1024_to_4096"]
    assert size.parameters[Part.language_model] == 6_738_415_616
    assert size.vision.tokens == 577
    assert size.connector.queries == 145
    larger = read_shapes(paper("align", "llm=vicuna_13b"))
    assert larger.parameters[Part.language_model] == 13_015_864_320


@pytest.mark.parametrize(
    ("trains", "text", "supervised", "expected"), [(ALIGN, 18, 17, 4.70), (FINETUNE, 190, 110, 13.65)]
)
def test_the_paper_s_arithmetic(trains: Any, text: float, supervised: float, expected: float) -> None:
    """TFLOP of a sample, as counted independently when the recipe was designed."""
    size = read_shapes(paper())
    work = Work.of_sample(size, text=text, supervised=supervised, images=1)
    assert sum(model_flops(size, {Part(name) for name in trains}, work).values()) / 1e12 == pytest.approx(
        expected, abs=0.005
    )


@pytest.mark.parametrize("trains", [ALIGN, FINETUNE, EVERYTHING], ids=["align", "finetune", "everything"])
def test_arithmetic_is_what_torch_counts(tiny_folder: Path, trains: Any) -> None:
    """Of a whole step at sizes where every operation counts; attention as torch sees it, without the causal half."""
    config = run_config(trains)
    model: Any = load_frozen(tiny_folder, config).train()
    described: AnchorFormerForConditionalGeneration = model
    (batch,) = batches_for(model, [range(8)])
    with FlopCounterMode(display=False) as counter:
        supervised_loss(model, batch, batch.num_supervised).backward()
    parts = described.config
    size = shapes_of(parts.vision_config.to_dict(), parts.text_config.to_dict(), parts.selector, parts.connector)
    squares = int(batch.cu_seqlens.diff().square().sum())
    work = Work(
        positions=batch.num_tokens, squares=squares, supervised=batch.num_supervised, images=len(batch.tiles_B3HW)
    )
    counted = sum(model_flops(size, config.stage.trains, work).values())
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_recomputing_is_a_forward_of_the_layers() -> None:
    size = read_shapes(paper())
    work = Work.of_sample(size, text=100, supervised=0, images=1)
    assert recomputed_flops(size, work) == forward_flops(size, work)[Part.language_model]


def test_what_is_read_without_a_network(tmp_path: Path) -> None:
    config = paper()
    unknown = replace(config, init_from=None, model=replace(config.model, language_model="some/where"))
    with pytest.raises(UserError, match="the shape of some/where is not known") as caught:
        read_shapes(unknown)
    assert "config.json" in caught.value.remedy
    folder = tmp_path / "llama"
    folder.mkdir()
    with pytest.raises(UserError, match="not known here") as caught:
        read_shapes(replace(unknown, model=replace(config.model, language_model=str(folder))))
    assert "download" not in caught.value.remedy
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    local = replace(config.model, language_model=str(folder))
    assert read_shapes(replace(unknown, model=local)).text.layers == 2
    wrong = replace(local, published={**local.published, str(folder): {"num_hidden_layers": 3}})
    with pytest.raises(UserError, match=r"is not what model\.published says"):
        read_shapes(replace(unknown, model=wrong))


def test_a_run_or_model_folder_speaks_for_itself(tiny_folder: Path) -> None:
    config = paper("finetune", f"init_from={tiny_folder}")
    described = json.loads((tiny_folder / "config.json").read_text())
    assert read_shapes(config).text.width == described["text_config"]["hidden_size"]


@pytest.mark.parametrize(
    ("vision", "text", "selector", "connector", "word"),
    [
        ({"model_type": "swin"}, LLAMA, ALL, MLP, "vision tower"),
        ({"model_type": "dinov2", "use_swiglu_ffn": True}, LLAMA, ALL, MLP, "gated"),
        ({"model_type": "clip_vision_model"}, {"model_type": "gpt2"}, ALL, MLP, "language model"),
        ({"model_type": "clip_vision_model"}, LLAMA, {**ALL, "_target_": "x.Mine"}, MLP, "selector costs"),
        ({"model_type": "clip_vision_model"}, LLAMA, ALL, {"_target_": "x.Mine"}, "connector costs"),
        ({"model_type": "clip_vision_model"}, LLAMA, {"_target_": ALL["_target_"]}, MLP, "selector.layer"),
    ],
)
def test_what_the_plan_does_not_know_is_said(vision: Any, text: Any, selector: Any, connector: Any, word: str) -> None:
    with pytest.raises(UserError, match=word):
        shapes_of(vision, text, selector, connector)


def test_planning_loads_no_torch() -> None:
    program = (
        "import sys\n"
        "from train.verbs.plan import main\n"
        "main(['experiment=paper_7b', 'hardware=a100x8'])\n"
        "print([name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "stage align" in done.stdout
    assert "stage finetune" in done.stdout
