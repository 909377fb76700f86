"""Model folders: round trip through the Auto classes, cheap derivation, and every damage found before loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import anchorformer.auto  # noqa: F401
from anchorformer.errors import UserError
from anchorformer.model_folder import MANIFEST, derive_folder, part_state, read_manifest, write_manifest
from anchorformer.weights import check_folder, load_model


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_auto_classes_load_the_folder(tiny_folder: Path) -> None:
    ours = load_model(tiny_folder, torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(tiny_folder, dtype=torch.float32)
    assert type(model) is type(ours)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_assembly_keeps_backbones_and_is_seeded(assemble_tiny, tiny_backbones: Path, tiny_folder: Path) -> None:
    from transformers import CLIPVisionModel, LlamaForCausalLM

    model = load_model(tiny_folder, torch.float32)
    llama = LlamaForCausalLM.from_pretrained(tiny_backbones / "llama").state_dict()
    for name, value in model.language_model.state_dict().items():
        rows = llama[name].shape[0]
        assert torch.equal(value[:rows], llama[name]), name
    clip = CLIPVisionModel.from_pretrained(tiny_backbones / "clip").state_dict()
    kept = dict(model.vision_tower.named_parameters())
    matched = sum(any(torch.equal(value, other) for other in clip.values() if other.shape == value.shape)
                  for value in kept.values())  # fmt: skip
    assert matched == len(kept)
    again = load_model(assemble_tiny(), torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_derived_folder_links_what_did_not_change(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_folder, torch.float32)
    changed = {name: value + 1 for name, value in part_state(model, "connector").items()}
    out = derive_folder(tiny_folder, {"connector": changed}, tmp_path / "next")
    check_folder(out)
    again = load_model(out, torch.float32)
    for name, value in model.state_dict().items():
        expected = value + 1 if name.startswith("connector.") else value
        assert torch.equal(again.state_dict()[name], expected), name
    assert (out / "language_model.safetensors").samefile(tiny_folder / "language_model.safetensors")
    assert not (out / "connector.safetensors").samefile(tiny_folder / "connector.safetensors")
    assert not (out / "config.json").samefile(tiny_folder / "config.json")


def test_derived_folder_refuses_other_tensors(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_folder, torch.float32)
    state = part_state(model, "connector")
    state.pop(min(state))
    with pytest.raises(UserError, match="missing"):
        derive_folder(tiny_folder, {"connector": state}, tmp_path / "next")
    assert not (tmp_path / "next").exists()


def rewrite_connector(folder: Path, change) -> None:
    """Changes the connector's tensors the way a careless script would: file and index rewritten, hashes too."""
    path = folder / "connector.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != path.name} | dict.fromkeys(
        tensors, path.name
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_manifest(folder)


def test_missing_renamed_and_resized_tensors_are_named(folder: Path) -> None:
    name = min(load_file(folder / "connector.safetensors"))
    rewrite_connector(folder, lambda tensors: tensors.update(renamed=tensors.pop(name)))
    with pytest.raises(UserError) as caught:
        check_folder(folder)
    assert name in str(caught.value)
    assert "renamed" in str(caught.value)

    rewrite_connector(folder, lambda tensors: tensors.update({name: torch.zeros(3)}) or tensors.pop("renamed"))
    with pytest.raises(UserError, match="of shape"):
        check_folder(folder)


def test_flipped_byte_and_truncated_file(folder: Path) -> None:
    path = folder / "connector.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"connector\.safetensors"):
        check_folder(folder)
    path.write_bytes(data[:-10])
    with pytest.raises(UserError, match="bytes"):
        check_folder(folder)


def test_a_flipped_byte_of_a_backbone_is_found_when_asked(folder: Path) -> None:
    path = folder / "language_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    check_folder(folder)
    with pytest.raises(UserError, match=r"language_model\.safetensors"):
        check_folder(folder, every_hash=True)


def test_another_selector_or_connector_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    check_folder(folder, config["selector"], config["connector"])
    with pytest.raises(UserError, match="num_anchors=9"):
        check_folder(folder, config["selector"] | {"num_anchors": 5}, config["connector"])
    with pytest.raises(UserError, match="depth=2"):
        check_folder(folder, config["selector"], config["connector"] | {"depth": 6})


def test_folder_without_manifest_is_no_model_folder(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match="not a model folder"):
        check_folder(folder)


def test_manifest_lists_every_file(tiny_folder: Path) -> None:
    listed = set(read_manifest(tiny_folder))
    assert listed == {path.name for path in tiny_folder.iterdir()} - {MANIFEST}


def test_an_invalid_generation_config_is_found(folder: Path) -> None:
    """transformers refuses to save one, which would be met behind the last step."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.9}))
    write_manifest(folder)
    with pytest.raises(UserError, match=r"generation_config\.json is not valid") as caught:
        check_folder(folder)
    assert "temperature" in caught.value.found
