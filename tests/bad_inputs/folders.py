"""Folders of models and backbones that are not what they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from anchorformer.assemble import assemble, read_recipe
from anchorformer.hub import load
from anchorformer.model_folder import write_manifest
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.weights import check_folder, load_model
from data.folders import model_folder
from tests.bad_inputs.case import Case, World, change_json
from tests.conftest import ANCHOR, CONNECTOR

Change = Callable[[Path], object]


def _model(name: str, change: Change, *says: str, resealed: bool = False, **asked: Any) -> Case:
    """A model folder that is changed, and, if `resealed`, given a manifest that agrees with the change."""

    def plant(world: World) -> None:
        folder = world.copy(world.model)
        change(folder)
        if resealed:
            write_manifest(folder)
        check_folder(folder, **asked)
        load("processor", folder, AnchorFormerProcessor.from_pretrained, local_files_only=True)
        load_model(folder, torch.float32)

    return Case(f"model_{name}", plant, says)


def _unlink(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def _write(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def _keys(name: str, **values: Any) -> Change:
    return lambda folder: change_json(folder / name, **values)


def _flip(name: str) -> Change:
    def change(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[-1] ^= 1
        (folder / name).write_bytes(raw)

    return change


def _connector(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Changes the connector's tensors and the index with them."""

    def rewrite(folder: Path) -> None:
        path, index = folder / "connector.safetensors", folder / "model.safetensors.index.json"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        names = json.loads(index.read_text())["weight_map"]
        kept = {name: file for name, file in names.items() if file != path.name}
        change_json(index, weight_map=kept | dict.fromkeys(tensors, path.name))

    return rewrite


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


INDEX = "model.safetensors.index.json"
MODELS = [
    _model("without_a_manifest", _unlink("MANIFEST.json"), "no MANIFEST.json"),
    _model("with_half_a_manifest", _write("MANIFEST.json", '{"files": '), "MANIFEST.json cannot be read"),
    _model("with_a_manifest_in_a_list", _write("MANIFEST.json", "[]"), "a JSON object"),
    _model("with_a_manifest_of_nothing", _write("MANIFEST.json", '{"files": 3}'), "an object under files"),
    _model("without_weights", _unlink("language_model.safetensors"), "language_model.safetensors", "no file"),
    _model("with_weights_cut", _write("language_model.safetensors", "x"), "language_model.safetensors", "1 bytes"),
    _model("with_a_flipped_bit", _flip("connector.safetensors"), "connector.safetensors", "sha256"),
    _model("with_a_flipped_bit_in_a_backbone", _flip("language_model.safetensors"), "language_model.safetensors",
           every_hash=True),
    _model("with_a_changed_config", _keys("config.json", image_token_id=3), "config.json"),
    _model("without_an_index", _unlink(INDEX), f"no {INDEX}", resealed=True),
    _model("with_an_index_of_lost_shards", _keys(INDEX, weight_map={"a": "lost.safetensors"}), "lost.safetensors",
           resealed=True),
    _model("with_an_index_in_a_list", _keys(INDEX, weight_map=[]), "an object under weight_map", resealed=True),
    _model("without_a_tensor", _connector(lambda tensors: tensors.pop(_first(tensors))), "1 missing", resealed=True),
    _model("with_a_tensor_renamed",
           _connector(lambda tensors: tensors.update({"connector.x": tensors.pop(_first(tensors))})),
           "unknown connector.x", resealed=True),
    _model("with_a_tensor_of_another_shape",
           _connector(lambda tensors: tensors.update({_first(tensors): torch.zeros(3)})), "of shape (3,)",
           resealed=True),
    _model("of_text_for_weights", _write("connector.safetensors", "x" * 99), "connector.safetensors", resealed=True),
    _model("with_a_config_of_text", _write("config.json", "hello"), "config.json", resealed=True),
    _model("with_a_config_in_a_list", _write("config.json", "[1]"), "config.json", resealed=True),
    _model("without_a_config", _unlink("config.json"), "config.json", resealed=True),
    _model("of_another_type", _keys("config.json", model_type="llava"), "model_type", resealed=True),
    _model("without_a_selector", _keys("config.json", selector={}), "no _target_", resealed=True),
    _model("with_a_selector_from_elsewhere", _keys("config.json", selector={"_target_": "os.system"}), "os.system",
           resealed=True),
    _model("with_fewer_anchors", lambda _: None, "num_anchors=9", "num_anchors=13",
           selector={**ANCHOR, "num_anchors": 13}),
    _model("of_another_depth", lambda _: None, "depth=2", "depth=3", connector={**CONNECTOR, "depth": 3}),
    _model("that_cannot_be_generated_from", _keys("generation_config.json", temperature=0.5, do_sample=False),
           "generation_config.json is not valid", resealed=True),
    _model("with_a_generation_config_of_text", _write("generation_config.json", "hello"), "generation_config.json",
           resealed=True),
    _model("without_a_processor", _unlink("processor_config.json"), "processor", resealed=True),
    _model("with_half_a_processor", _keys("processor_config.json", template=...), "no template", resealed=True),
    _model("with_a_processor_of_text", _write("processor_config.json", "hello"), "processor_config.json",
           resealed=True),
    _model("of_an_unknown_template", _keys("processor_config.json", template="v9"), "v9", resealed=True),
    _model("without_a_tokenizer", _unlink("tokenizer.json"), "tokenizer", resealed=True),
    _model("with_half_a_tokenizer", _write("tokenizer.json", '{"version": "1.0"}'), "no added_tokens", resealed=True),
    _model("with_a_tokenizer_in_a_list", _write("tokenizer.json", "[]"), "tokenizer.json", resealed=True),
    _model("with_a_file_more", _write("notes.txt", "mine"), resealed=True),
    Case("model_in_an_empty_folder", lambda world: model_folder(str(world.folder), "model", "config.json"),
         ("an empty folder",)),
    Case("model_nowhere", lambda world: model_folder(str(world.folder / "x"), "model", "config.json"),
         ("no such folder",)),
]  # fmt: skip


def _backbone(name: str, part: str, change: Change, *says: str) -> Case:
    """A backbone that is changed, and then assembled with a sound one."""

    def plant(world: World) -> None:
        parts = {"clip": world.backbones / "clip", "llama": world.backbones / "llama"}
        parts[part] = world.copy(parts[part])
        change(parts[part])
        assemble(str(parts["clip"]), str(parts["llama"]), ANCHOR, CONNECTOR, world.folder / "out", template="chat")

    return Case(f"{part}_{name}", plant, says)


def _recipe(name: str, content: str, *says: str) -> Case:
    return Case(f"recipe_{name}", lambda world: read_recipe(world.write("recipe.yaml", content)), says)


def _nested(key: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change_json(folder / "config.json", **{key: config[key] | values})

    return change


PREPROCESSOR = "preprocessor_config.json"
BACKBONES = [
    _backbone("that_is_gone", "clip", shutil.rmtree, "vision tower", "no such folder"),
    _backbone("without_a_config", "clip", _unlink("config.json"), "vision tower"),
    _backbone("with_half_a_config", "clip", _write("config.json", "{"), "config.json"),
    _backbone("of_an_unknown_type", "clip", _keys("config.json", model_type="clop"), "vision tower", "clop"),
    _backbone("of_another_family", "clip", _write("config.json", '{"model_type": "bert"}'), "bert"),
    _backbone("without_statistics", "clip", _unlink(PREPROCESSOR), PREPROCESSOR),
    _backbone("with_two_means", "clip", _keys(PREPROCESSOR, image_mean=[0.5, 0.5]), "image_mean=[0.5, 0.5]"),
    _backbone("with_a_deviation_of_zero", "clip", _keys(PREPROCESSOR, image_std=[0, 0, 0]), "image_std=[0, 0, 0]"),
    _backbone("with_a_mean_of_text", "clip", _keys(PREPROCESSOR, image_mean="grey"), "image_mean=grey"),
    _backbone("of_patches_of_nothing", "clip", _nested("vision_config", patch_size=0), "patch_size"),
    _backbone("of_patches_larger_than_images", "clip", _nested("vision_config", patch_size=99), "patch"),
    _backbone("of_an_unknown_activation", "clip", _nested("vision_config", hidden_act="swoosh"), "swoosh"),
    _backbone("of_no_layers", "clip", _nested("vision_config", num_hidden_layers=0), "layer"),
    _backbone("of_no_heads", "clip", _nested("vision_config", num_attention_heads=0), "num_attention_heads"),
    _backbone("of_heads_that_do_not_divide", "clip", _nested("vision_config", num_attention_heads=5), "5"),
    _backbone("of_text_for_a_width", "clip", _nested("vision_config", hidden_size="wide"), "hidden_size"),
    _backbone("without_weights", "clip", _unlink("model.safetensors"), "vision tower"),
    _backbone("with_a_pointer_for_weights", "clip", _write("model.safetensors", "version https://git-lfs"),
              "vision tower"),
    _backbone("of_another_width", "clip", _nested("vision_config", hidden_size=64, intermediate_size=128),
              "of another shape"),
    _backbone("that_is_gone", "llama", shutil.rmtree, "language model", "no such folder"),
    _backbone("that_is_a_vision_tower", "llama", _write("config.json", '{"model_type": "clip"}'), "swapped"),
    _backbone("of_an_unknown_activation", "llama", _keys("config.json", hidden_act="swoosh"), "swoosh"),
    _backbone("without_a_tokenizer", "llama", _unlink("tokenizer.json"), "tokenizer"),
    _backbone("with_a_number_for_eos", "llama", _keys("tokenizer_config.json", eos_token=3), "eos_token", "3"),
    _backbone("with_a_list_for_bos", "llama", _keys("tokenizer_config.json", bos_token=["<s>"]), "bos_token"),
    _backbone("with_a_number_for_its_class", "llama", _keys("tokenizer_config.json", tokenizer_class=3),
              "tokenizer_class"),
    _backbone("with_a_tokenizer_config_of_text", "llama", _write("tokenizer_config.json", "hello"),
              "tokenizer_config.json"),
    _backbone("without_weights", "llama", _unlink("model.safetensors"), "language model"),
    _backbone("of_another_width", "llama", _keys("config.json", hidden_size=64), "of another shape"),
    _backbone("without_a_template", "llama", _unlink("chat_template.jinja"), "chat template"),
    _backbone("with_a_broken_template", "llama", _write("chat_template.jinja", "{% for %}"), "chat template"),
    _backbone("with_a_template_that_forgets", "llama", _write("chat_template.jinja", "{{ messages[-1].content }}"),
              "chat template"),
    _recipe("that_is_no_yaml", "a: [1", "cannot be read"),
    _recipe("of_nothing", "", "'vision' is missing"),
    _recipe("with_a_key_misspelt", "vison: a\nlanguage_model: b\nselector: {}\nconnector: {}\n", "'vision'?"),
]  # fmt: skip

CASES = [*MODELS, *BACKBONES]
