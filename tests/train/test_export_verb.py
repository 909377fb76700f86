"""What a finished run is handed on as: a folder that only `anchorformer` is needed for, or the connector by itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from anchorformer.connector_folder import attach, read_description
from anchorformer.errors import UserError
from anchorformer.export import base_digest
from anchorformer.schema import to_plain
from anchorformer.weights import check_folder, load_model
from train.compose import compose
from train.run.folder import RunFolder
from train.verbs.export import main

ROOT = Path(__file__).parents[2]
QUESTIONS = ["what?", "which color?", "how many are there?", "a red cup", "where?", "who is it?", "when?", "why so?"]
ANSWERS = """
import json, sys
from pathlib import Path
import anchorformer.auto
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, questions = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)
ids = []
for number, question in enumerate(questions):
    image = Image.new("RGB", (30 + number, 40), (20 * number, 90, 200 - 9 * number))
    inputs = processor(images=image, conversations=[[("user", "<image>\\n" + question)]])
    ids.append(model.generate(**inputs, do_sample=False, max_new_tokens=6)[0].tolist())
assert not {"train", "data", "evals", "deepspeed", "hydra"} & set(sys.modules), "a training room was imported"
print(json.dumps(ids))
"""


def answers(folder: Path, where: Path) -> list[list[int]]:
    """Greedy ids on eight prompts, from a process that sees nothing of this repository but the installed library."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS, str(folder), json.dumps(QUESTIONS)],
        cwd=where, env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def finished(tiny_backbones: Path, assemble_tiny: Callable[..., Path], tmp_path: Path) -> Callable[[str], RunFolder]:
    """Run folders of both stages as a finished run leaves them, without the training."""

    def build(stage: str) -> RunFolder:
        run = RunFolder(tmp_path / stage)
        model = shutil.copytree(assemble_tiny(), run.model)
        selector = json.loads((model / "config.json").read_bytes())
        words = [f"stage={stage}", "hardware=cpu", "data.root=/data", f"model.vision={tiny_backbones / 'clip'}",
                 f"model.language_model={tiny_backbones / 'llama'}", "stage.template=chat"]  # fmt: skip
        config = to_plain(compose([*words, *(["init_from=x"] if stage == "finetune" else [])]))
        config["model"] |= {"selector": selector["selector"], "connector": selector["connector"]}
        run.config.write_text(json.dumps(config))
        run.environment.write_text(json.dumps({
            "command": ["train", f"stage={stage}"], "versions": {"torch": "2.13.0"}, "commit": "abc",
            "uncommitted_changes": False, "before": [],
        }))  # fmt: skip
        run.done.write_text("3 steps\n")
        (run.path / "evals").mkdir()
        result = {"task": "docvqa_val", "metric": "anls", "variant": "lmms_eval", "score": 0.5, "n_scored": 7,
                  "condition": "right", "limit": None}  # fmt: skip
        for name, changed in {"a": {}, "b": {"limit": 3, "task": "part"}, "c": {"score": None, "task": "none"}}.items():
            (run.path / "evals" / f"{name}.json").write_text(json.dumps(result | changed))
        (run.path / "evals" / "submissions").mkdir()
        return run

    return build


@pytest.mark.slow
def test_an_exported_model_answers_where_only_the_library_is(
    finished: Callable[[str], RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished("finetune")
    assert main([str(run.path), str(tmp_path / "out"), "dtype=fp32"]) == 0
    assert "exported model in fp32" in capsys.readouterr().out
    check_folder(tmp_path / "out", every_hash=True)
    (tmp_path / "elsewhere").mkdir()
    first, second = (answers(folder, tmp_path / "elsewhere") for folder in (run.model, tmp_path / "out"))
    assert first == second
    assert len({str(ids) for ids in first}) > 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| docvqa_val | anls (lmms_eval) | 0.5000 | 7 | right |" in card
    assert "part" not in card.split("## Scores")[1].split("##")[0]
    assert "commit abc" in card
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_half_precision_is_in_the_config_and_in_the_weights(
    finished: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    run = finished("finetune")
    main([str(run.path), str(tmp_path / "out")])
    state = load_file(tmp_path / "out" / "connector.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["dtype"] == "bfloat16"
    model, original = load_model(tmp_path / "out", torch.bfloat16), load_model(run.model, torch.bfloat16)
    for name, value in original.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_connector_finds_its_way_back_between_its_bases(
    finished: Callable[[str], RunFolder], tmp_path: Path, tiny_backbones: Path
) -> None:
    run = finished("align")
    main([str(run.path), str(tmp_path / "connector"), "what=connector", "dtype=fp32"])
    description = read_description(tmp_path / "connector")
    assert description.bases["language_model"]["name"] == str(tiny_backbones / "llama")
    assert sorted(path.name for path in (tmp_path / "connector").iterdir()) == [
        "README.md", "connector.json", "connector.safetensors",
    ]  # fmt: skip
    whole = attach(tmp_path / "connector", tmp_path / "whole")
    ours, theirs = load_model(whole, torch.float32), load_model(run.model, torch.float32)
    state = ours.state_dict()
    for name, value in theirs.state_dict().items():
        # All but the rows of the placeholder, which no model reads or says.
        rows = ours.image_token_id if len(value) == ours.config.text_config.vocab_size else len(value)
        assert torch.equal(value[:rows], state[name][:rows]), name
    assert not list(tmp_path.glob(".tmp-*"))


def test_another_base_and_a_damaged_connector_are_refused(
    finished: Callable[[str], RunFolder], tmp_path: Path, tiny_backbones: Path
) -> None:
    run = finished("align")
    main([str(run.path), str(tmp_path / "connector"), "what=connector"])
    other = shutil.copytree(tiny_backbones / "llama", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="another language model"):
        attach(tmp_path / "connector", tmp_path / "whole", language_model=str(other))
    assert not (tmp_path / "whole").exists()
    assert not list(tmp_path.glob(".tmp-*"))
    content = bytearray((tmp_path / "connector" / "connector.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "connector" / "connector.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        attach(tmp_path / "connector", tmp_path / "whole")
    with pytest.raises(UserError, match="is no connector folder"):
        attach(run.model, tmp_path / "whole")


def test_the_digest_is_of_the_tensors_and_not_of_the_files(assemble_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(assemble_tiny(), tmp_path / "one")
    before = base_digest(folder, "language_model")
    weights = load_file(folder / "language_model.safetensors")
    embedding = weights["language_model.model.embed_tokens.weight"]
    embedding[-1] += 1  # of the placeholder: added by the assembly, no part of what was published
    save_file(dict(reversed(weights.items())), folder / "language_model.safetensors", metadata={"other": "pt"})
    assert base_digest(folder, "language_model") == before
    embedding[3] += 1
    save_file(weights, folder / "language_model.safetensors")
    assert base_digest(folder, "language_model") != before


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["{run}"], "takes a run and a folder"),
        (["{run}", "{out}", "kind=model"], "takes a run and a folder"),
        (["{run}", "{out}", "dtype=int8"], "dtype=int8"),
        (["{run}", "{run}"], "exists already"),
        (["{run}", "{out}", "what=connector"], "not what was trained"),
        (["{out}", "{out}"], "config.yaml"),
    ],
)
def test_mistakes_leave_nothing(
    finished: Callable[[str], RunFolder], tmp_path: Path, words: list[str], problem: str
) -> None:
    run, out = finished("finetune"), tmp_path / "out"
    with pytest.raises(UserError, match=problem):
        main([word.format(run=run.path, out=out) for word in words])
    assert not out.exists()


def test_a_run_that_is_not_done_is_not_exported(finished: Callable[[str], RunFolder], tmp_path: Path) -> None:
    run = finished("finetune")
    run.done.unlink()
    with pytest.raises(UserError, match="is not done"):
        main([str(run.path), str(tmp_path / "out")])


@pytest.mark.parametrize("what", ["model", "connector"])
def test_a_full_disk_is_told_and_nothing_is_left(
    finished: Callable[[str], RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    for module in ("export", "connector_folder"):
        monkeypatch.setattr(f"anchorformer.{module}.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        main([str(finished("align").path), str(tmp_path / "out"), f"what={what}"])
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
