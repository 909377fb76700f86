"""Damaged folders: the file is named instead of a traceback, and no weight is ever made up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from anchorformer.assemble import assemble
from anchorformer.errors import UserError
from anchorformer.hub import load
from anchorformer.processing import AnchorFormerProcessor
from tests.conftest import ANCHOR, CONNECTOR

NOT_A_MODEL = {"version": "1.0", "added_tokens": [], "model": {"type": "none of the known"}}


@pytest.fixture
def llama(tiny_backbones: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_backbones / "llama", tmp_path / "llama"))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b'{"model": ', b"\xff\xfe\x00", b"[]", b"null", b'"text"'], ids=repr)
def test_a_file_that_holds_no_json_object_is_named(llama: Path, name: str, content: bytes) -> None:
    (llama / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        load("model", llama, AutoModelForCausalLM.from_pretrained)


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"added_tokens": []}, NOT_A_MODEL], ids=json.dumps)
def test_an_object_that_is_no_tokenizer_is_named(llama: Path, content: dict[str, Any]) -> None:
    (llama / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        load("tokenizer", llama, AutoTokenizer.from_pretrained)


@pytest.mark.parametrize(("index", "fragment"), [
    ({}, "weight_map: null"),
    ({"weight_map": ["model.norm.weight"]}, "weight_map: ["),
    ({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}, "model-00001-of-00002.safetensors"),
])  # fmt: skip
def test_an_index_without_its_shards_is_named(llama: Path, index: dict[str, Any], fragment: str) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json cannot be read") as caught:
        load("model", llama, AutoModelForCausalLM.from_pretrained)
    assert fragment in caught.value.found


def test_a_value_that_transformers_refuses_is_named(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    with pytest.raises(UserError, match="hidden_size"):
        load("model", llama, AutoConfig.from_pretrained)


@pytest.mark.parametrize(("change", "fragment"), [
    ({"num_hidden_layers": 9}, "missing ['model.layers."),
    ({"intermediate_size": 48}, "of another shape ['model.layers."),
])  # fmt: skip
def test_weights_that_a_config_asks_for_are_never_made_up(
    llama: Path, tiny_backbones: Path, tmp_path: Path, change: dict[str, int], fragment: str
) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match="the language model's weights are incomplete") as caught:
        assemble(str(tiny_backbones / "clip"), str(llama), ANCHOR, CONNECTOR, tmp_path / "out", template="chat")
    assert fragment in caught.value.found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "statistics", [{}, {"image_mean": 0.5}, {"image_mean": [1, 2]}, {"image_std": [0, 0, 0]}], ids=str
)
def test_image_statistics_that_are_none(tiny_backbones: Path, tmp_path: Path, statistics: dict[str, Any]) -> None:
    clip = Path(shutil.copytree(tiny_backbones / "clip", tmp_path / "clip"))
    file = clip / "preprocessor_config.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | statistics if statistics else {}))
    with pytest.raises(UserError, match="no image statistics"):
        assemble(str(clip), str(tiny_backbones / "llama"), ANCHOR, CONNECTOR, tmp_path / "out", template="chat")


def test_a_processor_without_its_values(tiny_folder: Path, tmp_path: Path) -> None:
    for path in tiny_folder.glob("*.j*"):
        shutil.copy(path, tmp_path)
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    del stored["num_image_tokens"]
    (tmp_path / "processor_config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"processor_config\.json is incomplete") as caught:
        AnchorFormerProcessor.from_pretrained(tmp_path)
    assert caught.value.found == "no num_image_tokens"
