"""What users get wrong, one case each: refused within seconds with found, expected and remedy on one screen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import train.__main__ as entry
from anchorformer.errors import UserError
from anchorformer.model_folder import write_manifest
from tests.train.tiny_world import write_world
from train.compose import ROOT


class World:
    """A run that would work, for cases to break."""

    def __init__(self, folder: Path, backbones: Path, model: Path) -> None:
        self.folder, self.backbones, self.model = folder, backbones, model
        self.overrides = write_world(folder, backbones)
        self.captions = folder / "data" / "captions.json"

    def start_copy(self) -> Path:
        """A model folder of this run's own to break, and the override that starts from it."""
        copy = self.folder / "start"
        shutil.copytree(self.model, copy)
        # The folder was assembled with these; the run asks for the same.
        self.overrides += [
            f"init_from={copy}", "model.connector.num_heads=2", "model.connector.head_dim=8",
            "model.connector.ff_mult=2",
        ]  # fmt: skip
        return copy

    def change_connector(self, change: Callable[[dict], None]) -> None:
        """Rewrites the connector's tensors, with a manifest that agrees with the new file."""
        copy = self.start_copy()
        path = copy / "connector.safetensors"
        tensors = load_file(path)
        change(tensors)
        path.unlink()  # the copy, not a link to the original
        save_file(tensors, path)
        index_path = copy / "model.safetensors.index.json"
        index = json.loads(index_path.read_text())
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != path.name} | dict.fromkeys(
            tensors, path.name
        )
        index_path.write_text(json.dumps(index))
        write_manifest(copy)


def typo(world: World) -> None:
    world.overrides.append("stage.warmup_ration=0.1")


def plus_typo(world: World) -> None:
    world.overrides.append("+stage.warmup_ration=0.1")


def wrong_type(world: World) -> None:
    world.overrides.append("stage.warmup_ratio=often")


def indivisible_batch(world: World) -> None:
    world.overrides.append("stage.global_batch=33")


def unknown_stage(world: World) -> None:
    world.overrides[0] = "stage=pretrain"


def source_field(world: World) -> None:
    world.overrides.append("data.sources.llava_558k.wieght=2")


def source_name(world: World) -> None:
    world.overrides.append("data.sources.llava.weight=2")


def negative_weight(world: World) -> None:
    world.overrides.append("data.sources.llava_558k.weight=-1")


def weight_of_no_record(world: World) -> None:
    world.overrides.append("data.sources.llava_558k.weight=0.1")


def missing_root(world: World) -> None:
    world.overrides.append(f"data.root={world.folder}/nowhere")


def missing_file(world: World) -> None:
    world.captions.unlink()


def wrong_layout(world: World) -> None:
    world.overrides = [text for text in world.overrides if not text.startswith(("data.sources", "data="))]
    world.overrides.append("data=docvqa")


def truncated_json(world: World) -> None:
    world.captions.write_text(world.captions.read_text()[:-40])


def outside_root(world: World) -> None:
    records = json.loads(world.captions.read_text())
    records[1]["image"] = "../../secret.png"
    world.captions.write_text(json.dumps(records))


def overlong(world: World) -> None:
    world.overrides.append("data.max_length=12")


def unknown_template(world: World) -> None:
    world.overrides.append("stage.template=v2")


def template_of_another_tokenizer(world: World) -> None:
    llama = world.folder / "llama"
    shutil.copytree(world.backbones / "llama", llama)
    (llama / "chat_template.jinja").unlink()
    world.overrides.append(f"model.language_model={llama}")


def missing_backbone(world: World) -> None:
    world.overrides.append(f"model.vision={world.folder}/clip")


def anchors_that_heads_do_not_divide(world: World) -> None:
    world.overrides.append("model.selector.num_anchors=10")


def run_that_leaves(world: World) -> None:
    world.overrides.append("run=../elsewhere")


def missing_tensor(world: World) -> None:
    world.change_connector(lambda tensors: tensors.pop(sorted(tensors)[0]))


def renamed_tensor(world: World) -> None:
    def rename(tensors: dict) -> None:
        tensors["connector.layers.0.renamed"] = tensors.pop(sorted(tensors)[0])

    world.change_connector(rename)


def other_count(world: World) -> None:
    world.start_copy()
    world.overrides.append("model.selector.num_anchors=13")


def other_depth(world: World) -> None:
    world.start_copy()
    world.overrides.append("model.connector.depth=3")


def flipped_byte(world: World) -> None:
    path = world.start_copy() / "connector.safetensors"
    raw = bytearray(path.read_bytes())
    path.unlink()
    raw[-1] ^= 1
    path.write_bytes(raw)


def no_model(world: World) -> None:
    world.overrides.append(f"init_from={world.folder}/data")


CASES = [
    (typo, ["stage.warmup_ration", "'stage.warmup_ratio'?"]),
    (plus_typo, ["stage.warmup_ration", "'stage.warmup_ratio'?"]),
    (wrong_type, ["stage.warmup_ratio='often'", "number"]),
    (indivisible_batch, ["33 samples", "multiple of 2", "stage.global_batch=34"]),
    (unknown_stage, ["'pretrain'", "align, finetune"]),
    (source_field, ["wieght", "'weight'?"]),
    (source_name, ["data.sources.llava", "_target_"]),
    (negative_weight, ["data.sources.llava_558k", "weight=-1", "greater than or equal to 0"]),
    (weight_of_no_record, ["llava_558k: weight 0.1 of 3"]),
    (missing_root, ["data.root", "nothing there"]),
    (missing_file, ["captions.json"]),
    (wrong_layout, ["train_v1.0.json"]),
    (truncated_json, ["captions.json"]),
    (outside_root, ["secret.png"]),
    (overlong, ["12"]),
    (unknown_template, ["v2"]),
    (template_of_another_tokenizer, ["template"]),
    (missing_backbone, ["vision tower", "/clip"]),
    (anchors_that_heads_do_not_divide, ["num_anchors=10"]),
    (run_that_leaves, ["../elsewhere"]),
    (missing_tensor, ["1 missing", "connector."]),
    (renamed_tensor, ["connector.layers.0.renamed"]),
    (other_count, ["num_anchors=9", "num_anchors=13"]),
    (other_depth, ["depth=2", "depth=3"]),
    (flipped_byte, ["connector.safetensors", "sha256"]),
    (no_model, ["init_from", "config.json"]),
]
BY_COMMAND = [typo, plus_typo, wrong_type, indivisible_batch, unknown_stage, missing_file, wrong_layout, truncated_json,
              missing_tensor, other_count]  # fmt: skip


@pytest.fixture
def world(tmp_path: Path, tiny_backbones: Path, tiny_folder: Path) -> World:
    return World(tmp_path, tiny_backbones, tiny_folder)


@pytest.mark.parametrize(("spoil", "fragments"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_refused(
    world: World, spoil: Callable[[World], None], fragments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("ranks would have been started"))
    spoil(world)
    with pytest.raises(UserError) as caught:
        entry.main([*world.overrides, "run=broken"] if spoil is not run_that_leaves else world.overrides)
    error = caught.value
    for fragment in fragments:
        assert fragment in str(error), str(error)
    assert error.found
    assert error.expected
    assert error.remedy
    assert not (world.folder / "checkpoints" / "broken").exists(), "a refused run leaves no folder behind"


def test_the_unspoilt_run_is_started(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without this, every case above could be refused for one reason that all share.
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda _, argv, __: started.append(argv))
    entry.main([*world.overrides, "run=fresh"])
    world.start_copy()
    entry.main([*world.overrides, "run=from_folder"])
    assert len(started) == 2


@pytest.mark.slow
@pytest.mark.parametrize("spoil", BY_COMMAND, ids=lambda spoil: spoil.__name__)
def test_refused_as_a_command(world: World, spoil: Callable[[World], None]) -> None:
    spoil(world)
    done = subprocess.run(
        [sys.executable, "-m", "train", *world.overrides, "run=broken"], cwd=ROOT, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    tail = done.stderr[done.stderr.index("error: ") :]
    assert [line.split(":")[0].strip() for line in tail.splitlines()[1:]] == ["found", "expected", "remedy"], tail
