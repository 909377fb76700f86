"""Assembly: what does not fit is refused from configurations and tokenizers, before a weight is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from anchorformer.assemble import assemble, main
from anchorformer.convert import to_published
from anchorformer.errors import UserError
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.vision import VisionTower
from anchorformer.weights import check_folder
from tests.conftest import ANCHOR, CONNECTOR

CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "T that the heads do not divide": ({"selector": ANCHOR | {"num_anchors": 8}}, ["num_anchors=8", "num_anchors=9"]),
    "unknown template": ({"template": "vicuna"}, ["vicuna", "chat"]),
    "template the tokenizer has no files for": ({"template": "chat", "language_model": "bare"}, ["chat_template"]),
    "swapped backbones": ({"language_model": "clip"}, ["'clip'", "swapped"]),
    "folder that is not there": ({"vision": "./nowhere"}, ["./nowhere", "no such folder"]),
    "no image statistics": ({"vision": "llama"}, ["preprocessor_config.json"]),
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_refused_before_weights_are_loaded(
    case: str, tiny_backbones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(VisionTower, "from_backbone", loaded)
    changes, fragments = CASES[case]
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (bare / name).write_bytes((tiny_backbones / "llama" / name).read_bytes())
    named = {"clip": str(tiny_backbones / "clip"), "llama": str(tiny_backbones / "llama"), "bare": str(bare)}
    arguments = {"vision": "clip", "language_model": "llama", "selector": ANCHOR, "connector": CONNECTOR,
                 "template": "chat"} | changes  # fmt: skip
    for role in ("vision", "language_model"):
        arguments[role] = named.get(arguments[role], arguments[role])
    with pytest.raises(UserError) as caught:
        assemble(**arguments, out=tmp_path / "out")
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_pointers_instead_of_weights_are_named(tiny_backbones: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    shutil.copytree(tiny_backbones / "clip", clip)
    (clip / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="git-lfs"):
        assemble(str(clip), str(tiny_backbones / "llama"), ANCHOR, CONNECTOR, tmp_path / "out", template="chat")


def test_the_command_reads_a_recipe(tiny_backbones: Path, tmp_path: Path) -> None:
    recipe = {"vision": str(tiny_backbones / "clip"), "language_model": str(tiny_backbones / "llama"),
              "selector": ANCHOR, "connector": CONNECTOR}  # fmt: skip
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(recipe))
    main([str(file), str(out), "--template", "chat"])
    check_folder(out, ANCHOR, CONNECTOR, every_hash=True)
    for text, fragment in (
        (yaml.safe_dump(recipe | {"conector": {}}), "'connector'?"),
        ("- a list", "'vision' is missing"),
        ("a: [", "YAML"),
    ):
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            main([str(file), str(out)])
        assert fragment in str(caught.value)
    with pytest.raises(UserError, match=r"gone\.yaml cannot be read"):
        main([str(tmp_path / "gone.yaml"), str(out)])


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_published_projector_takes_the_place_of_fresh_weights(
    tiny_backbones: Path, tmp_path: Path, suffix: str
) -> None:
    recipe = {"vision": str(tiny_backbones / "clip"), "language_model": str(tiny_backbones / "llama"),
              "selector": ANCHOR, "connector": CONNECTOR}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def assembled(*arguments: str) -> dict[str, torch.Tensor]:
        out = tmp_path / "out"
        main([str(tmp_path / "recipe.yaml"), str(out), "--template", "chat", *arguments])
        model = AutoModelForImageTextToText.from_pretrained(out)
        assert isinstance(model, AnchorFormerForConditionalGeneration)
        return {name: value.clone() for name, value in model.connector.state_dict().items()}

    wanted = {name: value.bfloat16() for name, value in assembled("--seed", "7").items()}
    published = {f"model.mm_projector.{name}": value for name, value in to_published(wanted).items()}
    file = tmp_path / f"mm_projector{suffix}"
    others = {"model.embed_tokens.weight": torch.zeros(2, 2)}
    torch.save(published | others, file) if suffix == ".bin" else save_file(published | others, file)
    found = assembled("--projector", str(file))
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(wanted, torch.float32)
    assert all(torch.equal(found[name], value.float()) for name, value in wanted.items())


class Planted:
    """What a file of a stranger may hold beside tensors."""


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("gone.bin", None, "No such file"),
        ("code.bin", {"mm_projector.0.weight": Planted()}, "Weights only load failed"),
        ("list.bin", [torch.zeros(1)], "list, not tensors by name"),
        ("numbers.bin", {"epoch": 3}, "not tensors by name"),
        ("places.bin", {0: torch.zeros(1)}, "not tensors by name"),
        ("pointer.bin", b"version https://git-lfs.github.com/spec/v1", "git-lfs"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1", "git-lfs"),
        ("empty.bin", b"", "git-lfs"),
        ("other.bin", {"mm_projector.0.weight": torch.zeros(3, 3)}, "does not fit this connector"),
    ],
)
def test_a_file_that_is_no_such_projector_is_refused_before_weights_are_loaded(
    tiny_backbones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: Any, fragment: str
) -> None:
    monkeypatch.setattr(VisionTower, "from_backbone", lambda *_: pytest.fail("weights were loaded"))
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(UserError) as caught:
        assemble(
            str(tiny_backbones / "clip"), str(tiny_backbones / "llama"), ANCHOR, CONNECTOR, tmp_path / "out",
            template="chat", projector=file,
        )  # fmt: skip
    assert fragment in str(caught.value)
