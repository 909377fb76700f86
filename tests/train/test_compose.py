"""conf/ and the command line: every YAML composes into a run, and every mistake is named before anything is loaded."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from anchorformer.errors import UserError
from anchorformer.schema import TARGET, parse, parse_plugin, to_plain
from data.overrides import CONF, schema_keys
from train.choices import Part
from train.compose import COMMAND_LINE, ROOT, compose
from train.config import RunConfig

GROUPS = COMMAND_LINE.groups
KEYS = schema_keys(RunConfig)
STAGES = ("align", "finetune")
# What no YAML can know.
GIVEN = ["run=test", "data.root=/data", "init_from=/model"]


NODES = ("hardware=a100x8_2nodes",)
NEEDS = {"zero3_nvme": ("zero.nvme_path=/nvme",), "zero3_hpz": NODES, "zero3_plus": NODES}
"""Options that say no more than half, and the other half."""
TOO_MANY_RANKS = ("a100x8_8nodes",)
"""For the global batch of the tiny experiments; `test_presets` has them with the others."""


def composed(*overrides: str) -> RunConfig:
    return compose([*GIVEN, *overrides])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("group", "option"), [(g, o) for g, options in GROUPS.items() for o in options])
def test_every_yaml_composes_into_a_run(group: str, option: str, stage: str) -> None:
    if group == "lora" and option != "none" and stage == "align":
        with pytest.raises(UserError, match="does not train"):
            composed("stage=align", f"lora={option}")
        return
    config = composed(f"stage={stage}", *([f"{group}={option}"] if group != "stage" else []), *NEEDS.get(option, ()))
    assert config.stage.name.value == stage
    # Through the file that ranks read, nothing is lost.
    assert parse(RunConfig, yaml.safe_load(yaml.safe_dump(to_plain(config))), "config.yaml") == config


def pairwise(groups: dict[str, list[str]]) -> list[dict[str, str]]:
    """Few choices, one option per group each, in which every two options of different groups meet."""
    missing = {
        ((g, o), (h, p)) for g, h in itertools.combinations(sorted(groups), 2) for o in groups[g] for p in groups[h]
    }
    rows = []
    while missing:
        row: dict[str, str] = dict(min(missing))
        for group in sorted(groups.keys() - row.keys()):
            met = {o: sum(tuple(sorted(((group, o), k))) in missing for k in row.items()) for o in groups[group]}
            row[group] = max(groups[group], key=lambda option: met[option])
        missing -= set(itertools.combinations(sorted(row.items()), 2))
        rows.append(row)
    return rows


def check(rows: list[dict[str, str]]) -> None:
    for row in rows:
        config = composed(*(f"{group}={option}" for group, option in row.items()))
        assert config.stage.name.value == row["stage"]
        assert config.zero.stage == int(row["zero"][len("zero")])


MANY = ("data", "selector", "connector", "tiling", "lora")


def alone(groups: dict[str, list[str]]) -> dict[str, list[str]]:
    """Without the options that take a second one to make sense."""
    return {group: [o for o in options if o not in (*NEEDS, *TOO_MANY_RANKS)] for group, options in groups.items()}


@pytest.mark.slow
def test_options_of_any_two_groups_go_together() -> None:
    # Data sets meet the other groups through the stages and experiments that choose them; there are many selectors,
    # connectors and tilings, and they meet the others below; an adapter goes with one stage only.
    few = {group: options for group, options in alone(GROUPS).items() if group not in MANY}
    rows = pairwise(few)
    assert len(rows) < 60, "a cover, not the product"
    check(rows)


@pytest.mark.slow
def test_every_selector_and_connector_goes_with_every_other_option_and_each_other() -> None:
    check(pairwise({group: options for group, options in alone(GROUPS).items() if group not in ("data", "lora")}))


@pytest.mark.parametrize("group", ["zero", "hardware", "experiment"])
def test_an_adapter_goes_with_every_option_but_those_that_say_why_not(group: str) -> None:
    for option in GROUPS[group]:
        more = NEEDS.get(option, ())
        assert composed("stage=finetune", "lora=default", f"{group}={option}", *more).stage.lora is not None
    with pytest.raises(UserError, match="do not go with ZeRO-3"):
        composed("stage=finetune", "lora=qlora", "zero=zero3")
    with pytest.raises(UserError, match="on CUDA only"):
        composed("stage=finetune", "lora=qlora", "hardware=cpu")


def test_every_folder_of_conf_is_a_group_and_every_experiment_part_belongs_to_one() -> None:
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    elsewhere = {"decoding", "eval", "prepare", "sweep"}
    other = {path.stem for path in CONF.glob("*.yaml")} - {"config"}
    assert folders - set(GROUPS) <= elsewhere, f"composed by another entry point: {other}"
    names = {f"{experiment}_{stage}" for experiment in GROUPS["experiment"] for stage in STAGES}
    assert {path.stem for path in (CONF / "experiment" / "stage").glob("*.yaml")} <= names


@pytest.mark.parametrize(
    ("group", "base"), [("selector", "Selector"), ("connector", "Connector"), ("integration", "Integration")]
)
def test_plugin_yamls_list_every_field_of_their_class(group: str, base: str) -> None:
    # So that a misspelt field is found by comparing with the YAML, before the class is imported.
    import importlib

    module = importlib.import_module(f"anchorformer.{group}s.base")
    for option in (name for name in GROUPS[group] if name != "none"):
        spec = getattr(composed("stage=align", f"{group}={option}").model, group)
        plugin: Any = parse_plugin(getattr(module, f"{base}Config"), spec, module.PACKAGE, option)
        assert {field.name for field in dataclasses.fields(plugin)} == set(spec) - {TARGET}, option


def test_an_integration_is_trained_as_the_connector_is_unless_told_otherwise() -> None:
    for stage in STAGES:
        trains = composed(f"stage={stage}", "integration=eram_v", "stage.trains.connector.lr=3e-4").stage.trains
        assert trains[Part.integration] == trains[Part.connector]
        assert trains[Part.integration].lr == 3e-4
    own = composed("stage=align", "integration=eram_v", "stage.trains.integration.lr=5e-5").stage.trains
    assert (own[Part.integration].lr, own[Part.connector].lr) == (5e-5, 1e-3)
    assert Part.integration not in composed("stage=align").stage.trains
    assert composed("stage=align", "integration=eram_v", "model.integration.layers=[3,4]").model.integration[
        "layers"
    ] == [3, 4]
    for override in ("stage.trains.integration.lr=1e-3", "hardware.compile=[integration]"):
        with pytest.raises(UserError, match="that the model does not have"):
            composed("stage=align", override)
    with pytest.raises(UserError, match=r"model\.integration\.layer'"):
        composed("stage=align", "integration=eram_v", "model.integration.layer=[3]")


def test_the_published_recipe() -> None:
    align, finetune = (composed(f"stage={stage}", "experiment=paper_7b") for stage in STAGES)
    for config in (align, finetune):
        assert config.model.vision == "openai/clip-vit-large-patch14-336"
        assert config.model.language_model == "lmsys/vicuna-7b-v1.5"
        assert config.model.selector["num_anchors"] == 145
        assert config.model.connector["depth"] == 6
        assert config.stage.epochs == 1
        assert config.stage.schedule.value == "cosine"
        assert config.stage.warmup_ratio == 0.03
        assert config.data.max_length == 2048
        assert config.hardware.precision.value == "bf16"
        assert all(part.weight_decay == 0 for part in config.stage.trains.values())
    assert align.stage.global_batch == 256
    assert align.stage.template == "plain"
    assert {part: value.lr for part, value in align.stage.trains.items()} == {Part.connector: 1e-3}
    assert finetune.stage.global_batch == 128
    assert finetune.stage.template == "v1"
    assert {part: value.lr for part, value in finetune.stage.trains.items()} == {
        Part.connector: 2e-5, Part.language_model: 2e-5,
    }  # fmt: skip


def test_an_experiment_says_what_differs_between_stages_and_the_command_line_wins() -> None:
    align = composed("stage=align", "experiment=smoke")
    finetune = composed("stage=finetune", "experiment=smoke", "stage.max_steps=7", "hardware=one_gpu", "seed=3")
    assert set(align.stage.trains) == {Part.connector}
    assert set(finetune.stage.trains) == {Part.connector, Part.language_model}
    assert align.data.sources != finetune.data.sources
    assert (finetune.stage.max_steps, finetune.hardware.ranks, finetune.seed) == (7, 1, 3)


def test_schema_keys_that_no_yaml_mentions_can_be_set_and_parts_can_be_added() -> None:
    assert all(OmegaConf.select(OmegaConf.load(path), "clip_norm") is None for path in (CONF / "stage").glob("*.yaml"))
    config = composed("stage=align", "stage.clip_norm=0.5", "stage.trains.vision_tower.lr=1e-6", "log.every=3")
    assert (config.stage.clip_norm, config.log.every) == (0.5, 3)
    assert config.stage.trains[Part.vision_tower].lr == 1e-6


def test_a_preset_of_hardware_may_say_how_ranks_communicate_and_the_command_line_wins() -> None:
    cpu = composed("stage=align", "hardware=cpu", "zero=zero3")
    assert (cpu.hardware.device.value, cpu.hardware.ranks) == ("cpu", 2)
    assert (cpu.zero.stage, cpu.zero.overlap_comm) == (3, False)
    assert composed("stage=align", "hardware=cpu", "zero.overlap_comm=true").zero.overlap_comm
    assert composed("stage=align", "hardware=a100x8").zero.overlap_comm


def test_names_given_by_default_differ() -> None:
    one, other = (compose(["stage=align", "data.root=/data"]).run for _ in range(2))
    assert one.startswith("align-")
    assert one != other


BAD = [
    (["stage=algin"], ["stage=algin", "'align'"]),
    ([], ["no stage", "one of align, finetune"]),
    (["stage=align", "stage.globl_batch=64"], ["stage.globl_batch", "'stage.global_batch'"]),
    (["stage=align", "+stage.globl_batch=64"], ["stage.globl_batch", "'stage.global_batch'"]),
    (["stage=align", "++sede=1"], ["'sede'", "'seed'"]),
    (["stage=align", "optim.lrr=1"], ["optim.lrr", "experiment", "hardware"]),
    (["stage=align", "global_batch=8"], ["global_batch", "'stage.global_batch'"]),
    (["stage=align", "stage.trains.conector.lr=1"], ["stage.trains.conector.lr"]),
    (["stage=align", "model.connector.dpth=2"], ["model.connector.dpth", "'model.connector.depth'"]),
    (["stage=align", "selector.num_anchors=20"], ["'model.selector.num_anchors'?"]),
    (["stage=align", "num_anchors=20"], ["'model.selector.num_anchors'?"]),
    (["stage=align", "connector.depth=3"], ["'model.connector.depth'?"]),
    (["stage=align", "connector.dpth=3"], ["'model.connector.depth'?"]),
    (["stage=align", "micro_batch=3"], ["'hardware.micro_batch'?"]),
    (["stage=align", "experiment=papr_7b"], ["papr_7b", "'paper_7b'", "miniworld"]),
    (["stage=align", "vision=/models/clip"], ["/models/clip", "model.vision="]),
    (["stage=align", "experiment=real_tiny"], ["data.root=???", "add data.root="]),
    (["stage=align", "hardware.ranks=two", "data.root=/d"], ["hardware.ranks='two'", "integer"]),
    (["stage=align", "zero.stage=4", "data.root=/d"], ["zero.stage", "0, 1, 2 or 3"]),
    (["stage=align", "stage.template=vicuna", "data.root=/d"], ["stage.template", "vicuna", "plain, v1, chat"]),
    (["stage=align", "stage.schedule=linear", "data.root=/d"], ["stage.schedule='linear'", "cosine"]),
    (["stage=align", "hardware.ranks=7", "data.root=/d"], ["stage.global_batch", "multiple of 7"]),
    (["stage=align", "stage.max_steps=7", "data.root=/d"], ["epochs=1.0, max_steps=7", "stage.epochs=null"]),
    (["stage=finetune", "data.root=/d"], ["init_from=null", "init_from=checkpoints/"]),
    (["stage=align", "seed=[1"], ["seed=[1"]),
    (["stage=align", "model.vision=${nowhere}", "data.root=/d"], ["nowhere"]),
]


@pytest.mark.parametrize(("overrides", "fragments"), BAD, ids=lambda value: " ".join(value)[:60])
def test_mistakes_are_named(overrides: list[str], fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        compose(overrides)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 6


OUT_OF_RANGE = {
    "checkpoint.every": [0, -1], "checkpoint.keep": [0], "log.every": [0], "seed": [-1],
    "hardware.micro_batch": [0, -4], "hardware.ranks": [0, -1], "hardware.nodes": [0], "hardware.threads": [-1],
    "stage.global_batch": [0, -32], "stage.max_steps": [0, -5], "stage.epochs": [0, -1, "inf"],
    "stage.warmup_ratio": [7, -0.1, "nan"], "stage.min_lr_ratio": [1.5], "stage.clip_norm": [-1, "nan"],
    "stage.eps": [0], "stage.betas": ["[1,0.9]", "[0.9,-1]"], "stage.trains.connector.lr": [0, -1e-3, "nan"],
    "stage.trains.connector.weight_decay": [-0.1], "zero.bucket_size": [0],
    "data.max_length": [0], "data.max_dropped_share": [2], "data.token_budget": [0], "data.num_workers": [-1],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OUT_OF_RANGE.items() for value in values])
def test_numbers_out_of_range_are_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match="1 value") as caught:
        composed("stage=align", f"{key}={value}")
    assert caught.value.found.startswith(key)
    assert "Input should be" in caught.value.expected


def test_a_run_that_is_killed_has_a_checkpoint_by_default() -> None:
    assert composed("stage=align").checkpoint.every == 500
    assert composed("stage=align", "checkpoint.every=null").checkpoint.every is None
    for name in ("smoke", "miniworld", "miniworld_full"):
        assert composed("stage=finetune", f"experiment={name}").checkpoint.every == 200


@settings(max_examples=60, deadline=None)
@given(key=st.sampled_from([key for key in KEYS if len(key.rsplit(".", 1)[-1]) > 4]), data=st.data())
def test_a_lost_letter_is_found(key: str, data: st.DataObject) -> None:
    head, dot, last = key.rpartition(".")
    place = data.draw(st.integers(1, len(last) - 1))
    wrong = head + dot + last[:place] + last[place + 1 :]
    if wrong in KEYS:
        return
    for prefix in ("", "+", "++"):
        with pytest.raises(UserError, match="unknown key") as caught:
            compose(["stage=align", f"{prefix}{wrong}=1"])
        assert "'?" in caught.value.expected


def test_a_refused_config_has_not_loaded_torch() -> None:
    program = (
        "import sys\n"
        "from train.compose import compose\n"
        "from anchorformer.errors import UserError\n"
        "from train.prepare import check_files\n"
        "for overrides in (['stage=align', 'seeed=1'], ['stage=align', 'data.root=/nowhere', 'run=x']):\n"
        "    try:\n"
        "        check_files(compose(overrides))\n"
        "    except UserError as error:\n"
        "        print(error.what)\n"
        "print([name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["unknown key 'seeed'", "data.root is not a folder", "[]"]


def test_hydra_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    composed("stage=align")
    assert list(tmp_path.iterdir()) == []


def test_the_published_recipe_builds_at_true_shapes(golden_root: Path) -> None:
    """Connector and projector of CLIP-L and Vicuna-7B without weights, counted against the published module's."""
    import json

    import torch

    from anchorformer.connectors.base import PACKAGE, ConnectorConfig

    counts = json.loads((golden_root / "params" / "param_counts.json").read_text())
    vision_width, text_width = 1024, 4096
    for row in counts["table"]:
        spec = composed("stage=align", "experiment=paper_7b", f"model.connector.depth={row['depth']}").model.connector
        with torch.device("meta"):
            connector = parse_plugin(ConnectorConfig, spec, PACKAGE, "connector").build(vision_width, text_width)
        total = sum(value.numel() for value in connector.parameters())
        assert total == row["without_latents"] + counts["mlp2x_1024_to_4096"], row["depth"]
