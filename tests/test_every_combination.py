"""Every connector with every selector, vision tower and language model: trains, survives a save, or says why not."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Dinov2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from anchorformer.assemble import assemble
from anchorformer.configuration import AnchorFormerConfig
from anchorformer.contracts import Batch
from anchorformer.errors import UserError
from anchorformer.model_folder import derive_folder, part_state, write_parts
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.weights import check_folder, load_model
from tests.train.cases import FINETUNE, batches_for, run_config
from train.choices import Part
from train.loss import supervised_loss
from train.stage import freeze

CONF = Path(__file__).resolve().parents[1] / "conf"
SMALL = {
    "num_anchors": 9, "num_queries": 4, "depth": 2, "num_heads": 2, "head_dim": 8, "ff_mult": 2, "width": 16,
    "ff_width": 24, "positions": 16, "neighbours": 4, "low_layer": 1, "deep_layer": -1,
}  # fmt: skip
"""The shipped YAMLs at the size of towers with 16 patches and 4 heads; null and 0 stay what they are."""

VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 7,
}  # fmt: skip
TEXT = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 120, "max_position_embeddings": 256,
}  # fmt: skip
TOWERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "clip": lambda: AutoConfig.for_model("clip_vision_model", **VISION, intermediate_size=48),
    "dinov2": lambda: Dinov2Config(**VISION, mlp_ratio=2),
    "siglip": lambda: SiglipVisionConfig(**VISION, intermediate_size=48, vision_use_head=False),
}
WITH_CLS = ("clip", "dinov2")
TEXTS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**TEXT, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**TEXT, tie_word_embeddings=True),
}
NEED_CLS = {
    "anchor", "average", "cls_similarity", "correlation", "fastervlm", "prumerge_plus", "visionzip", "vtc_cls",
}  # fmt: skip
"""Selectors that compare with [CLS], and so do not go with SigLIP."""

RAGGED = {"correlation"}
"""Selectors of which images have different numbers of anchors, for connectors that map each by itself."""
MAP_EACH = {"anchor_former", "anchor_former_tiny", "identity", "mlp"}

STAGE = run_config(FINETUNE).stage

Row = dict[str, str]


def _specs(group: str) -> dict[str, dict[str, Any]]:
    """Name -> plug-in mapping of each shipped YAML at the small size; those that differ in size only come once."""
    specs: dict[str, dict[str, Any]] = {}
    for path in sorted((CONF / group).glob("*.yaml")):
        spec = yaml.safe_load(path.read_text())
        base, *_ = spec.pop("defaults", [None])
        if base:
            spec = yaml.safe_load((CONF / group / f"{base}.yaml").read_text()) | spec
        small = {key: SMALL.get(key, value) if value else value for key, value in spec.items()}
        if small not in specs.values():
            specs[path.stem] = small
    return specs


CONNECTORS, SELECTORS = _specs("connector"), _specs("selector")


def _is_allowed(row: Row) -> bool:
    goes_together = row["selector"] not in RAGGED or row["connector"] in MAP_EACH
    return goes_together and (row["tower"] in WITH_CLS or row["selector"] not in NEED_CLS)


def _product() -> list[Row]:
    names = ("connector", "selector", "tower", "text")
    return [dict(zip(names, row, strict=True)) for row in itertools.product(CONNECTORS, SELECTORS, TOWERS, TEXTS)]


def _pairs(row: Row) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    yield from itertools.combinations(row.items(), 2)


def _cover(rows: list[Row]) -> list[Row]:
    """Few of the rows, in which every two options that meet in any of them meet."""
    missing = {pair for row in rows for pair in _pairs(row)}
    chosen = []
    # Connectors with selectors are most of the pairs, so one row for each of these, whose other options rotate.
    by_parts: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_parts.setdefault((row["connector"], row["selector"]), []).append(row)
    for group in by_parts.values():
        best = max(group, key=lambda row: sum(pair in missing for pair in _pairs(row)))
        missing -= set(_pairs(best))
        chosen.append(best)
    assert not missing, missing
    return chosen


def _model(row: Row) -> AnchorFormerForConditionalGeneration:
    torch.manual_seed(0)
    config = AnchorFormerConfig(
        vision_config=TOWERS[row["tower"]](), text_config=TEXTS[row["text"]](), selector=SELECTORS[row["selector"]],
        connector=CONNECTORS[row["connector"]], image_token_id=TEXT["vocab_size"] - 1,
    )  # fmt: skip
    return AnchorFormerForConditionalGeneration(config)


def _train(model: Any) -> Batch:
    """Two steps; returns what they were made on."""
    freeze(model, STAGE)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    (batch,) = batches_for(model, [[0, 1]])
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        loss = supervised_loss(model, batch, batch.num_supervised)
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith("vision_tower.")}
    return batch


def _same_as_saved(model: Any, folder: Path, batch: Batch) -> None:
    again = load_model(folder, torch.float32)
    with torch.no_grad():
        first, second = (supervised_loss(each.eval(), batch, 1) for each in (model, again))
    assert torch.equal(first, second)


def _check(rows: list[Row], folder: Path, saved_by: tuple[tuple[str, ...], ...]) -> None:
    """Trains all rows; saves and loads those that are the first of theirs by any of the options in `saved_by`."""
    seen = set()
    for number, row in enumerate(rows):
        kinds = {tuple(row[name] for name in names) for names in saved_by}
        try:
            model = _model(row)
            batch = _train(model)
            if not kinds <= seen:
                model.config.save_pretrained(folder / str(number))
                write_parts(folder / str(number), {part.value: part_state(model, part.value) for part in Part})
                _same_as_saved(model, folder / str(number), batch)
        except (AssertionError, RuntimeError, UserError) as error:
            error.add_note(f"with {row}")
            raise
        seen |= kinds


def test_any_two_parts_go_together(tmp_path: Path) -> None:
    rows = _cover([row for row in _product() if _is_allowed(row)])
    refused = len(RAGGED) * len(set(CONNECTORS) - MAP_EACH)
    assert len(rows) == len(CONNECTORS) * len(SELECTORS) - refused
    _check(rows, tmp_path, (("connector",), ("selector",), ("tower", "text")))


@pytest.mark.slow
@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_combination(connector: str, tmp_path: Path) -> None:
    rows = [row for row in _product() if _is_allowed(row) and row["connector"] == connector]
    # A selector has no weights: a folder of the same other parts differs by a line of its config.
    _check(rows, tmp_path, (("tower", "text"), ("selector", "tower")))


def test_selectors_have_no_weights() -> None:
    for selector in SELECTORS:
        model = _model({"connector": "identity", "selector": selector, "tower": "clip", "text": "llama"})
        assert not model.selector.state_dict()


@pytest.fixture(scope="module")
def backbones(tiny_backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per tower and language model, with the files that published ones have."""
    folder = tmp_path_factory.mktemp("every_backbone")
    for name, make in TOWERS.items():
        AutoModel.from_config(make()).save_pretrained(folder / name)
        shutil.copy(tiny_backbones / "clip" / "preprocessor_config.json", folder / name)
    for name, make in TEXTS.items():
        shutil.copytree(tiny_backbones / "llama", folder / name, ignore=shutil.ignore_patterns("model*", "config*"))
        config = make()
        config.vocab_size = json.loads((tiny_backbones / "llama" / "config.json").read_text())["vocab_size"]
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(("tower", "text"), [*itertools.product(TOWERS, TEXTS)])
def test_from_published_files_to_a_trained_folder(backbones: Path, tmp_path: Path, tower: str, text: str) -> None:
    """By the way that every run takes; each pair of backbones with parts of its own."""
    turn = [*itertools.product(TOWERS, TEXTS)].index((tower, text))
    connector_name = [*CONNECTORS][(3 * turn + 1) % len(CONNECTORS)]
    parts = {"tower": tower, "connector": connector_name}
    selectors = [name for name in SELECTORS if _is_allowed(parts | {"selector": name})]
    selector, connector = SELECTORS[selectors[turn % len(selectors)]], CONNECTORS[connector_name]
    start = assemble(
        str(backbones / tower), str(backbones / text), selector, connector, tmp_path / "start", template="chat"
    )
    check_folder(start, selector, connector, every_hash=True)
    model = load_model(start, torch.float32)
    batch = _train(model)
    trained = {part: part_state(model, part) for part in FINETUNE}
    done = derive_folder(start, trained, tmp_path / "done")
    check_folder(done, selector, connector, every_hash=True)
    _same_as_saved(model, done, batch)


@pytest.mark.parametrize("connector", sorted(set(CONNECTORS) - MAP_EACH))
def test_connectors_with_queries_of_their_own_refuse_other_numbers_of_anchors(connector: str) -> None:
    for selector in RAGGED:
        with pytest.raises(UserError, match="does not map each anchor by itself"):
            _model({"connector": connector, "selector": selector, "tower": "clip", "text": "llama"})


@pytest.mark.parametrize("selector", sorted(NEED_CLS))
def test_what_does_not_go_together_says_so(selector: str) -> None:
    for connector, text in itertools.product(CONNECTORS, TEXTS):
        row = {"connector": connector, "selector": selector, "tower": "siglip", "text": text}
        with pytest.raises(UserError, match=r"\[CLS\]"):
            _model(row)
