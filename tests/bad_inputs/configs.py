"""Mistakes in configs, overrides and plug-ins."""

from __future__ import annotations

from typing import Any

from anchorformer.connectors.base import PACKAGE as CONNECTORS
from anchorformer.connectors.base import ConnectorConfig
from anchorformer.schema import parse, parse_plugin
from anchorformer.selectors.base import PACKAGE as SELECTORS
from anchorformer.selectors.base import SelectorConfig
from data.config import DataConfig
from data.mixture import open_sources
from data.overrides import CommandLine
from data.scan_config import ScanConfig
from data.sources.base import PACKAGE as SOURCES
from data.sources.base import SourceConfig
from data.verbs.scan import COMMAND_LINE as SCAN
from evals.config import EvalConfig
from tests.bad_inputs.case import Case
from tests.train.cases import ALIGN, run_config
from train.compose import COMMAND_LINE as TRAIN

ANCHOR = "anchorformer.selectors.anchor.AnchorSelectorConfig"
FORMER = "anchorformer.connectors.anchor_former.AnchorFormerConnectorConfig"
LLAVA = "data.sources.llava.LlavaConfig"
TASKS: dict[str, Any] = {"model": "m", "tasks": {"t": {}}, "data": {"root": "r"}}


def _run(name: str, *says: str, trains: Any = ALIGN, **changes: Any) -> Case:
    return Case(f"config_{name}", lambda _: run_config(trains, **changes), says)


def _override(command: CommandLine, *words: str, says: tuple[str, ...]) -> Case:
    return Case(f"override_{'_'.join(words)}", lambda _: command.read(list(words)), says)


def _plugin(name: str, base: type, package: str, says: tuple[str, ...], **spec: Any) -> Case:
    return Case(f"plugin_{name}", lambda _: parse_plugin(base, spec, package, "here"), says)


def _parsed(name: str, schema: type, says: tuple[str, ...], values: dict[str, Any]) -> Case:
    return Case(name, lambda _: parse(schema, values, "here"), says)


CONFIGS = [
    _run("batch_of_none", "stage.global_batch=0", "greater than or equal to 1", stage__global_batch=0),
    _run("batch_below_none", "stage.global_batch=-8", stage__global_batch=-8),
    _run("batch_of_text", "stage.global_batch='many'", "valid integer", stage__global_batch="many"),
    _run("batch_of_a_half", "stage.global_batch=1.5", "valid integer", stage__global_batch=1.5),
    _run("batch_of_true", "stage.global_batch=True", "valid integer", stage__global_batch=True),
    _run("seed_of_false", "seed=False", "valid integer", seed=False),
    _run("batch_that_ranks_do_not_divide", "8 samples over 3 rank(s)", "stage.global_batch=9", hardware__ranks=3),
    _run("batch_that_nodes_do_not_divide", "8 samples over 5", hardware__nodes=5),
    _run("epochs_and_steps", "epochs=1.0, max_steps=4", "exactly one", stage__epochs=1.0),
    _run("neither_epochs_nor_steps", "epochs=None, max_steps=None", stage__max_steps=None),
    _run("no_steps", "stage.max_steps=0", stage__max_steps=0),
    _run("epochs_of_nan", "stage.epochs=nan", stage__epochs=float("nan"), stage__max_steps=None),
    _run("endless_epochs", "stage.epochs=inf", stage__epochs=float("inf"), stage__max_steps=None),
    _run("epochs_below_none", "stage.epochs=-1.0", stage__epochs=-1.0, stage__max_steps=None),
    _run("unknown_stage", "stage.name='pretrain'", "'align' or 'finetune'", stage__name="pretrain"),
    _run("finetune_from_nothing", "init_from=null", "init_from=checkpoints/", stage__name="finetune"),
    _run("unknown_template", "v2", "plain, v1, chat", stage__template="v2"),
    _run("unknown_schedule", "stage.schedule='linear'", stage__schedule="linear"),
    _run("warmup_beyond_the_end", "stage.warmup_ratio=1.5", "less than or equal to 1", stage__warmup_ratio=1.5),
    _run("warmup_below_none", "stage.warmup_ratio=-0.1", stage__warmup_ratio=-0.1),
    _run("end_above_the_peak", "stage.min_lr_ratio=2", stage__min_lr_ratio=2),
    _run("clip_below_none", "stage.clip_norm=-1", stage__clip_norm=-1),
    _run("clip_at_infinity", "stage.clip_norm=inf", stage__clip_norm=float("inf")),
    _run("beta_of_one", "stage.betas", "less than 1", stage__betas=[0.9, 1.0]),
    _run("one_beta", "stage.betas", stage__betas=[0.9]),
    _run("eps_of_zero", "stage.eps=0", stage__eps=0),
    _run("rate_of_zero", "stage.trains.connector.lr=0", trains={"connector": {"lr": 0}}),
    _run("rate_below_zero", "stage.trains.connector.lr=-0.001", trains={"connector": {"lr": -1e-3}}),
    _run("rate_of_nan", "stage.trains.connector.lr=nan", trains={"connector": {"lr": float("nan")}}),
    _run("rate_of_text", "stage.trains.connector.lr='fast'", trains={"connector": {"lr": "fast"}}),
    _run("rate_missing", "'stage.trains.connector.lr' is missing", trains={"connector": {}}),
    _run("decay_below_zero", "weight_decay=-0.1", trains={"connector": {"lr": 1, "weight_decay": -0.1}}),
    _run("part_misspelt", "conector", "vision_tower", trains={"conector": {"lr": 1e-3}}),
    _run("part_key_misspelt", "unknown key", "'lr'?", trains={"connector": {"lr": 1e-3, "lrr": 1}}),
    _run("parts_in_a_list", "stage.trains", "dictionary", trains=["connector"]),
    _run("stage_key_misspelt", "stage.warmup_ration", "'warmup_ratio'?", stage__warmup_ration=0.1),
    _run("group_misspelt", "unknown key 'stge'", "'stage'?", stge={}),
    _run("group_that_is_a_number", "checkpoint=3", checkpoint=3),
    _run("seed_below_zero", "seed=-1", seed=-1),
    _run("unknown_engine", "engine='fsdp'", engine="fsdp"),
    _run("unknown_repro", "repro='exact'", "'fast' or 'strict'", repro="exact"),
    _run("zero_stage_of_four", "zero.stage is unknown", "0, 1, 2 or 3", zero__stage=4),
    _run("bucket_of_nothing", "zero.bucket_size=0", zero__bucket_size=0),
    _run("compiled_under_zero_3", "hardware.compile", "zero.stage up to 2", zero__stage=3,
         hardware__compile=["language_model"]),
    _run("folded_under_zero_3", "fold_kv", "zero.stage up to 2", zero__stage=3, model__connector={"fold_kv": True}),
    _run("compiled_part_misspelt", "hardware.compile", "llm", hardware__compile=["llm"]),
    _run("unknown_device", "hardware.device='tpu'", hardware__device="tpu"),
    _run("no_ranks", "hardware.ranks=0", hardware__ranks=0),
    _run("micro_batch_of_none", "hardware.micro_batch=0", hardware__micro_batch=0),
    _run("unknown_precision", "hardware.precision='fp16'", hardware__precision="fp16"),
    _run("memory_of_none", "hardware.memory_gb=0", hardware__memory_gb=0),
    _run("restarts_below_none", "hardware.max_restarts=-1", hardware__max_restarts=-1),
    _run("unknown_kernels", "hardware.kernels='cuda'", hardware__kernels="cuda"),
    _run("log_every_none", "log.every=0", log__every=0),
    _run("checkpoint_every_none", "checkpoint.every=0", checkpoint__every=0),
    _run("no_checkpoint_kept", "checkpoint.keep=0", checkpoint__keep=0),
    _run("watchdog_without_patience", "watchdog.step_seconds=0", watchdog__step_seconds=0),
    _run("endless_watchdog", "watchdog.startup_seconds=inf", watchdog__startup_seconds=float("inf")),
    _run("length_of_none", "data.max_length=0", data__max_length=0),
    _run("unknown_length_rule", "data.overlength='cut'", "truncate_answer", data__overlength="cut"),
    _run("unknown_image_rule", "data.on_bad_image='ignore'", "'error' or 'skip'", data__on_bad_image="ignore"),
    _run("unknown_record_rule", "data.on_bad_record='ignore'", "'error' or 'skip'", data__on_bad_record="ignore"),
    _run("share_in_percent", "data.max_dropped_share=2", "less than or equal to 1", data__max_dropped_share=2),
    _run("workers_below_none", "data.num_workers=-1", data__num_workers=-1),
    _run("budget_of_none", "data.token_budget=0", data__token_budget=0),
    _run("sources_in_a_list", "data.sources", data__sources=["llava"]),
    _run("no_root", "data.root=None", data__root=None),
    _run("nothing_to_log_but_the_end", stage__max_steps=1, log__every=1000),
    _run("nothing_saved_before_the_end", checkpoint__every=None),
    _run("clipping_switched_off", stage__clip_norm=0),
    _parsed("scan_of_an_unknown_template", ScanConfig, ("template='vicuna'",),
            {"data": {"root": "r", "sources": {}}, "processor": "p", "template": "vicuna"}),
    _parsed("scan_with_threads_of_text", ScanConfig, ("threads='all'",),
            {"data": {"root": "r", "sources": {}}, "processor": "p", "threads": "all"}),
    _parsed("evaluation_of_nothing", EvalConfig, ("no task was named",), {**TASKS, "tasks": {}}),
    _parsed("evaluation_in_batches_of_none", EvalConfig, ("batch_size", "1 or more"), {**TASKS, "batch_size": 0}),
    _parsed("evaluation_of_so_many", EvalConfig, ("limit", "-3"), {**TASKS, "limit": -3}),
    _parsed("evaluation_under_an_unknown_condition", EvalConfig, ("conditions", "'blind'"),
            {**TASKS, "conditions": ["blind"]}),
    _parsed("evaluation_twice_alike", EvalConfig, ("each once",), {**TASKS, "conditions": ["right", "right"]}),
]  # fmt: skip

OVERRIDES = [
    _override(TRAIN, "experiment=null", says=("experiment=null names no file", "paper_7b", "leave experiment out")),
    _override(TRAIN, "stage=pretrain", says=("'pretrain'", "align, finetune")),
    _override(TRAIN, "hardware=a100x9", "stage=align", says=("a100x9", "'a100x8'")),
    _override(TRAIN, "zero=zero4", "stage=align", says=("zero4", "zero3")),
    _override(TRAIN, "optim.lrr=1", "stage=align", says=("unknown key 'optim.lrr'",)),
    _override(TRAIN, "+optim.lrr=1", "stage=align", says=("unknown key 'optim.lrr'",)),
    _override(TRAIN, "stage.global_bach=4", "stage=align", says=("'stage.global_batch'?",)),
    _override(TRAIN, "deepspeed.zero_optimization.stge=3", "stage=align", says=("unknown key 'deepspeed.zero",)),
    _override(TRAIN, "global_batch=4", "stage=align", says=("'stage.global_batch'?",)),
    _override(TRAIN, "stage.global_batch=4,8", "stage=align", says=("several values", "[4,8]")),
    _override(TRAIN, "--stage", "align", says=("stage=align, without dashes",)),
    _override(TRAIN, "stage", says=("stage=...",)),
    _override(TRAIN, "run=a=b", "stage=align", says=("quotes",)),
    _override(TRAIN, "run=[a", "stage=align", says=("cannot be read",)),
    _override(TRAIN, "run=x", says=("no stage is chosen", "stage=")),
    _override(SCAN, "data=docvq", says=("'docvqa'",)),
    _override(SCAN, "stage=align", "data=docvqa", says=("unknown key 'stage'",)),
]

PLUGINS = [
    _plugin("without_a_target", SelectorConfig, SELECTORS, ("no _target_",), num_anchors=9),
    _plugin("from_elsewhere", SelectorConfig, SELECTORS, ("subprocess.Popen",), _target_="subprocess.Popen", args="id"),
    _plugin("from_a_package_of_like_name", SelectorConfig, SELECTORS, ("anchorformer.selectors_of_mine.X",),
            _target_="anchorformer.selectors_of_mine.X"),
    _plugin("of_a_file_that_is_not_there", SelectorConfig, SELECTORS, ("cannot be found",),
            _target_="anchorformer.selectors.none.X"),
    _plugin("of_a_class_that_is_not_there", SelectorConfig, SELECTORS, ("cannot be found", "Anker"),
            _target_="anchorformer.selectors.anchor.Anker"),
    _plugin("of_another_kind", SelectorConfig, SELECTORS, ("wrong kind",),
            _target_="anchorformer.selectors.base.Selector"),
    _plugin("that_is_no_text", SelectorConfig, SELECTORS, ("does not name",), _target_=3),
    _plugin("key_misspelt", SelectorConfig, SELECTORS, ("num_ankers", "'num_anchors'?"), _target_=ANCHOR, num_ankers=9),
    _plugin("anchors_of_text", SelectorConfig, SELECTORS, ("num_anchors='nine'",), _target_=ANCHOR, num_anchors="nine"),
    _plugin("depth_of_none", ConnectorConfig, CONNECTORS, ("depth=0",), _target_=FORMER, depth=0),
    _plugin("heads_below_none", ConnectorConfig, CONNECTORS, ("num_heads=-1",), _target_=FORMER, num_heads=-1),
    _plugin("connector_that_selects", ConnectorConfig, CONNECTORS, ("does not name",), _target_=ANCHOR),
    _plugin("weight_below_none", SourceConfig, SOURCES, ("weight=-1",), _target_=LLAVA, annotations="x", weight=-1),
    _plugin("weight_of_nan", SourceConfig, SOURCES, ("weight=nan",), _target_=LLAVA, annotations="x",
            weight=float("nan")),
    _plugin("without_annotations", SourceConfig, SOURCES, ("'annotations' is missing",), _target_=LLAVA),
    _plugin("with_unclear_columns", SourceConfig, SOURCES, ("not clear",),
            _target_="data.sources.huggingface.HuggingfaceConfig", dataset="x"),
    _plugin("with_an_unknown_kind", SourceConfig, SOURCES, ("kinds", "'human' or 'augmented'"),
            _target_="data.sources.chartqa.ChartqaConfig", split="train", kinds=["machine"]),
    Case("sources_of_weight_zero", lambda world: open_sources(parse(DataConfig, {
        "root": str(world.folder), "sources": {"a": {"_target_": LLAVA, "annotations": "x", "weight": 0}}}, "here")),
        ("nothing to train on",)),
    Case("root_that_is_not_there", lambda world: open_sources(parse(DataConfig, {
        "root": str(world.folder / "none"), "sources": {}}, "here")), ("nothing there",)),
    Case("root_that_is_a_file", lambda world: open_sources(parse(DataConfig, {
        "root": str(world.write("file", "x")), "sources": {}}, "here")), ("a file",)),
]  # fmt: skip

CASES = [*CONFIGS, *OVERRIDES, *PLUGINS]
