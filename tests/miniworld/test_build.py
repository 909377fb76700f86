"""Changes when the budget command, its cache or its checks change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

from anchorformer.errors import UserError
from miniworld import __main__ as command
from miniworld import build as building
from miniworld.config import BUDGETS, ClipConfig, LlamaConfig, MiniWorldConfig, WorldConfig, _code_of

TINY = MiniWorldConfig(
    world=WorldConfig(captions=2, instruct=2, single=2, val=2, text_only=3),
    clip=ClipConfig(steps=2, batch=4, pictures=12),
    llama=LlamaConfig(steps=2, batch=4, gate=0.0),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return building.build(TINY, tmp_path_factory.mktemp("miniworld") / "tiny")


def test_build_writes_world_backbones_and_manifest(built: Path) -> None:
    manifest = json.loads((built / building.MANIFEST).read_text())
    assert manifest["digest"] == TINY.digest
    assert manifest["records"]["llava_pretrain/captions.json"] == 6
    assert 0 <= manifest["clip"]["recall_at_1_of_100"] <= 1
    assert len(manifest["clip"]["cls_attention_entropy"]) == 4
    assert set(manifest["llama"]["text_exact_match"]) >= {"doc/name", "scene/color", "chart/value"}
    assert CLIPVisionModel.from_pretrained(built / "backbones/clip").config.patch_size == 12
    preprocessor = json.loads((built / "backbones/clip/preprocessor_config.json").read_text())
    assert preprocessor["crop_size"] == {"height": 96, "width": 96}
    model = LlamaForCausalLM.from_pretrained(built / "backbones/llama")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(built / "backbones/llama"))


def test_second_build_touches_nothing(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(building, "write_world", refuse)
    assert building.build(TINY, built) == built


def test_other_numbers_or_a_missing_manifest_build_again(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        pass

    def start(*_: object) -> None:
        raise Started

    monkeypatch.setattr(building, "write_world", start)
    monkeypatch.setattr(building.shutil, "rmtree", lambda *_, **__: None)
    kept = (built / building.MANIFEST).read_bytes()
    try:
        with pytest.raises(Started):
            building.build(dataclasses.replace(TINY, llama=dataclasses.replace(TINY.llama, seed=1)), built)
        # The manifest went first, so that a build that dies is not taken for a finished one.
        assert not (built / building.MANIFEST).exists()
        with pytest.raises(Started):
            building.build(TINY, built)
    finally:
        (built / building.MANIFEST).write_bytes(kept)


def test_digest_follows_numbers_and_code_but_no_words() -> None:
    assert len({config.digest for config in BUDGETS.values()}) == len(BUDGETS)
    assert _code_of('"""a"""\nx = 1  # why\ndef f():\n    "b"\n    return x') == _code_of("x = 1\ndef f():\n  return x")
    assert _code_of("x = 1") != _code_of("x = 2")


def test_language_model_that_cannot_look_up_stops_the_build() -> None:
    report = {"text_exact_match": dict.fromkeys(building.GATED, 1.0) | {"doc/date": 0.5}}
    building._check_gate(report, LlamaConfig(gate=0.5))
    with pytest.raises(UserError, match="doc/date") as error:
        building._check_gate(report, LlamaConfig(gate=0.9))
    assert "--llama-steps" in error.value.remedy


def test_command_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, built: Path) -> None:
    asked: list[tuple[MiniWorldConfig, Path]] = []

    def record(config: MiniWorldConfig, out: Path) -> Path:
        asked.append((config, out))
        return built

    monkeypatch.setattr(building, "build", record)
    assert command.main(["--budget", "smoke", "--out", "x", "--seed", "3", "--llama-steps", "7"]) == 0
    config, out = asked[0]
    assert out == Path("x/smoke")
    assert (config.llama.steps, config.llama.seed, config.clip.seed) == (7, 3, 3)
    assert config.clip.steps == BUDGETS["smoke"].clip.steps
    assert config.world == BUDGETS["smoke"].world


def test_command_says_what_is_wrong_on_one_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> Path:
        raise UserError("it", found="this", expected="that", remedy="do so")

    monkeypatch.setattr(building, "build", fail)
    assert command.main([]) == 2
    assert "do so" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--budget", "huge"])
