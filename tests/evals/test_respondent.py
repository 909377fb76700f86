"""The real model under evaluation: scores do not depend on the batch, losses are the model's own, images matter."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from anchorformer.devices import Device, Precision
from anchorformer.errors import UserError
from anchorformer.vision import VisionTower
from data.record import ImageRef
from evals import __main__ as command
from evals.config import EvalConfig, EvalDataConfig
from evals.questions import Question
from evals.respondent import ModelRespondent, load

WORDS = ("red", "blue", "how many", "what is the value of the tallest bar", "a", "where is it", "total?")


def png(seed: int, size: tuple[int, int] = (28, 28)) -> bytes:
    stream = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1])).save(stream, "PNG")
    return stream.getvalue()


def ask(number: int, *, images: int = 1) -> Question:
    text = "<image>\n" * images + WORDS[number % len(WORDS)]
    refs = tuple(ImageRef(data=png(10 * number + i, (28 + 7 * (number % 3), 28))) for i in range(images))
    return Question(f"q{number}", (("user", text),), refs, (WORDS[(number + 1) % len(WORDS)],), {})


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return [ask(number, images=(1, 0, 1, 2)[number % 4]) for number in range(16)]


@pytest.fixture(scope="module")
def respondent(tiny_folder: Path) -> ModelRespondent:
    return load(tiny_folder, config(tiny_folder))


def config(folder: Path, **values: object) -> EvalConfig:
    return EvalConfig(**{"model": str(folder), "tasks": {"t": {}}, "data": EvalDataConfig(root="r"), **values})  # type: ignore[arg-type]


def in_batches_of(respondent: ModelRespondent, size: int) -> ModelRespondent:
    return ModelRespondent(respondent._model, respondent._processor, size, respondent.facts)


def test_answers_do_not_depend_on_the_batch(respondent: ModelRespondent, questions: list[Question]) -> None:
    together = in_batches_of(respondent, 16).answers(questions, 6)
    assert (
        together
        == in_batches_of(respondent, 1).answers(questions, 6)
        == in_batches_of(respondent, 5).answers(questions, 6)
    )
    assert len(set(together)) > 1
    assert not any("<image>" in text or "</s>" in text or text != text.strip() for text in together)


def test_an_image_is_encoded_once_in_a_batch(respondent: ModelRespondent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten questions about three images and two about none; what is answered is what is answered one by one."""
    refs = [ImageRef(data=png(seed, (28 + 7 * seed, 28))) for seed in range(3)]
    shown = [(0,), (1,), (0,), (), (1, 0), (2,), (0,), (1, 1), (), (2,), (0, 2), (1,)]
    asked = [
        Question(f"q{number}", (("user", "<image>\n" * len(images) + WORDS[number % len(WORDS)]),),
                 tuple(refs[image] for image in images), (WORDS[(number + 1) % len(WORDS)],), {})
        for number, images in enumerate(shown)
    ]  # fmt: skip
    one_by_one = in_batches_of(respondent, 1)
    answers, losses = one_by_one.answers(asked, 6), one_by_one.answer_losses(asked)
    seen: list[int] = []
    forward = VisionTower.forward

    def counted(tower: VisionTower, pixels: torch.Tensor, *rest: object) -> object:
        seen.append(len(pixels))
        return forward(tower, pixels, *rest)

    monkeypatch.setattr(VisionTower, "forward", counted)
    together = in_batches_of(respondent, len(asked))
    assert together.answers(asked, 6) == answers
    assert seen == [3]
    for (ours, count), (theirs, same) in zip(together.answer_losses(asked), losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert count == same
    assert seen == [3, 3]
    assert in_batches_of(respondent, 4).answers(asked, 6) == answers
    assert seen == [3, 3, 2, 3, 2 + 1], "batch by batch"


def test_the_image_reaches_the_loss(respondent: ModelRespondent, questions: list[Question]) -> None:
    seen = [item for item in questions if len(item.images) == 1]
    swapped = [Question(item.id, item.turns, (ImageRef(data=png(999)),), item.references, item.meta) for item in seen]
    for (right, count), (wrong, same) in zip(
        respondent.answer_losses(seen), respondent.answer_losses(swapped), strict=True
    ):
        assert count == same
        assert right != wrong


def test_losses_are_those_of_the_padded_model(respondent: ModelRespondent, questions: list[Question]) -> None:
    model, processor = respondent._model, respondent._processor
    found = in_batches_of(respondent, 7).answer_losses(questions)
    for item, (loss, count) in zip(questions, found, strict=True):
        images = [Image.open(io.BytesIO(ref.data or b"")) for ref in item.images]
        example = processor.encode([*item.turns, ("assistant", item.references[0])], images, sample_id=item.id)
        with torch.no_grad():
            mean = model(
                input_ids=example.input_ids_S[None],
                attention_mask=torch.ones(1, example.input_ids_S.numel(), dtype=torch.long),
                pixel_values=example.tiles_B3HW,
                labels=example.labels_S[None],
            ).loss
        assert count == int((example.labels_S[1:] != -100).sum())
        assert loss / count == pytest.approx(float(mean), abs=1e-4)


def test_facts_name_what_decides_a_score(respondent: ModelRespondent) -> None:
    facts = respondent.facts
    assert (facts["template"], facts["visual_tokens_per_image"], facts["image_size"]) == ("chat", 9, 28)
    assert facts["precision"] == "fp32"
    assert "cores" in facts["machine"]
    assert len(facts["model_sha256"]) == 64
    assert (
        facts["versions"]["torch"] == torch.__version__.split("+")[0] or facts["versions"]["torch"] == torch.__version__
    )


def test_another_template_than_the_trained_one_is_a_choice(tiny_folder: Path) -> None:
    assert load(tiny_folder, config(tiny_folder, template="v1")).facts["template"] == "v1"
    with pytest.raises(UserError, match="template"):
        load(tiny_folder, config(tiny_folder, template="vicuna"))


def test_a_damaged_model_folder_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / "connector.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"damaged at connector\.safetensors"):
        load(tmp_path / "model", config(tmp_path / "model"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_device_is_named(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        load(tiny_folder, config(tiny_folder, device=Device.cuda))


def test_bf16_answers_too(tiny_folder: Path, questions: list[Question]) -> None:
    half = load(tiny_folder, config(tiny_folder, precision=Precision.bf16, batch_size=8))
    assert len(half.answers(questions, 4)) == len(questions)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Three questions each in the native formats of the three tasks, and captions."""
    chart, docs = tmp_path / "chartqa" / "ChartQA Dataset" / "test", tmp_path / "docvqa"
    (chart / "png").mkdir(parents=True)
    (docs / "documents").mkdir(parents=True)
    for number in range(3):
        (chart / "png" / f"{number}.png").write_bytes(png(number))
        (docs / "documents" / f"{number}.png").write_bytes(png(50 + number))
    for kind in ("human", "augmented"):
        rows = [{"imgname": f"{n}.png", "query": WORDS[n], "label": str(n)} for n in range(3)]
        (chart / f"test_{kind}.json").write_text(json.dumps(rows))
    entries = [
        {"questionId": n, "question": WORDS[n], "image": f"documents/{n}.png", "answers": ["a", "b"]} for n in range(3)
    ]
    (docs / "val_v1.0.json").write_text(json.dumps({"data": entries}))
    talk = [
        {
            "id": n,
            "image": f"{n}.png",
            "conversations": [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": WORDS[n]}],
        }
        for n in range(3)
    ]
    (tmp_path / "captions.json").write_text(json.dumps(talk))
    return tmp_path


def test_the_command_end_to_end(
    tiny_folder: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = world / "out"
    overrides = [
        f"model={tiny_folder}", f"data.root={world}", f"data.cache_dir={world}/cache", f"out={out}", "batch_size=4",
        "task=[docvqa_val,chartqa_test,miniworld_caption]", "conditions=[right,shuffled,none]",
        "tasks.chartqa_test.max_new_tokens=3", "tasks.docvqa_val.max_new_tokens=3",
        "tasks.miniworld_caption.source.annotations=captions.json",
        "tasks.miniworld_caption.source.images=docvqa/documents",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["evals", *overrides])
    assert command.main() == 0
    assert len(list(out.glob("*.json"))) == len(list(out.glob("*.jsonl"))) == 9
    chart = json.loads((out / "chartqa_test-right.json").read_text())
    assert (chart["n"], set(chart["groups"])) == (6, {"human", "augmented"})
    assert chart["decoding"]["max_new_tokens"] == 3
    losses = [
        json.loads((out / f"miniworld_caption-{condition}.json").read_text())["score"]
        for condition in ("right", "shuffled", "none")
    ]
    assert len(set(losses)) == 3
    printed = capsys.readouterr().out
    assert "docvqa_val (shuffled image): anls" in printed


def test_damro_and_another_selector_are_evaluations_of_their_own(
    tiny_folder: Path, questions: list[Question], respondent: ModelRespondent
) -> None:
    damro = {"_target_": "anchorformer.decoding.damro.DamroConfig", "top_k": 3, "alpha": 4.0}
    fewer = {"_target_": "anchorformer.selectors.average.AverageSelectorConfig", "num_anchors": 5}
    given = config(tiny_folder, decoding=damro, selector=fewer, batch_size=16)
    assert (given.variant_name, command.out_folder(given)) == ("average-damro", tiny_folder / "evals" / "average-damro")
    assert config(tiny_folder).variant_name is None
    assert config(tiny_folder, decoding=damro, variant="damro_3").variant_name == "damro_3"
    otherwise = load(tiny_folder, given)
    assert (otherwise.facts["visual_tokens_per_image"], otherwise.facts["selector"]) == (5, fewer)
    assert respondent.facts["selector"]["_target_"].endswith("AnchorSelectorConfig")
    answers = otherwise.answers(questions, 6)
    assert answers == [answer for item in questions for answer in otherwise.answers([item], 6)]
    greedily = load(tiny_folder, config(tiny_folder, selector=fewer, batch_size=16)).answers(questions, 6)
    about_images = [bool(item.images) for item in questions]
    same = [one == other for one, other in zip(answers, greedily, strict=True)]
    assert all(alike for alike, image in zip(same, about_images, strict=True) if not image)
    assert not all(same)
    with pytest.raises(UserError, match="another layer") as caught:
        load(tiny_folder, config(tiny_folder, selector=fewer | {"layer": 1}))
    assert caught.value.remedy == "set selector.layer=-2"
    assert load(tiny_folder, config(tiny_folder, selector=fewer | {"layer": 2})).facts["visual_tokens_per_image"] == 5
    with pytest.raises(UserError, match="feature cache"):
        config(tiny_folder, decoding=damro, data=EvalDataConfig(root="r", feature_cache="c"))
    with pytest.raises(UserError, match="no folder name"):
        config(tiny_folder, variant="../up")


def test_the_command_keeps_other_evaluations_apart(
    tiny_folder: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = world / "model"
    shutil.copytree(tiny_folder, folder)
    shared = [f"model={folder}", f"data.root={world}", f"data.cache_dir={world}/cache", "task=docvqa_val",
              "tasks.docvqa_val.max_new_tokens=2"]  # fmt: skip
    for words in ([], ["decoding=damro", "decoding.top_k=3"], ["selector=visionzip", "selector.num_anchors=6"]):
        monkeypatch.setattr("sys.argv", ["evals", *shared, *words])
        assert command.main() == 0
    found = {
        path.parent.name: json.loads(path.read_text()) for path in (folder / "evals").rglob("docvqa_val-right.json")
    }
    assert found.keys() == {"evals", "damro", "visionzip"}
    assert found["damro"]["decoding"] == {
        "method": "damro", "alpha": 2.0, "top_k": 3, "beta": 0.1, "layer": None, "max_new_tokens": 2,
    }  # fmt: skip
    assert found["evals"]["decoding"] == {"method": "greedy", "max_new_tokens": 2}
    assert [found[name]["visual_tokens_per_image"] for name in ("evals", "visionzip")] == [9, 6]
    assert all(0.1 < result["time"]["peak_memory_gib"] < 100 for result in found.values())
    for words, message in (
        (["selector.num_anchors=6"], "without selector="), (["selector=visionsip"], "visionsip"),
        (["selector=anchor_tiny"], "anchor_tiny"),
        (["decoding=damro", "decoding.topk=3"], "topk"), (["decoding=beams"], "beams"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            command.compose_config([*shared, *words])


def test_real_files_are_asked_as_they_are(
    tiny_folder: Path, realdata_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        f"model={tiny_folder}", f"data.root={realdata_root}", f"data.cache_dir={tmp_path}/cache", f"out={tmp_path}/out",
        "task=[docvqa_val,docvqa_test,chartqa_test]", "conditions=[right,shuffled]", "limit=4",
        *(f"tasks.{name}.max_new_tokens=2" for name in ("docvqa_val", "docvqa_test", "chartqa_test")),
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["evals", *overrides])
    assert command.main() == 0
    scored = {
        path.stem: (result["n"], result["n_scored"])
        for path in (tmp_path / "out").glob("*.json")
        for result in [json.loads(path.read_text())]
    }
    assert len(scored) == 6
    for name, (n, n_scored) in scored.items():
        assert 0 < n <= 4
        assert n_scored == (0 if name.startswith("docvqa_test") else n), "the test split is published without answers"
    rows = (tmp_path / "out" / "docvqa_val-right-limit4.jsonl").read_text().splitlines()
    assert all(json.loads(row)["references"] for row in rows)


def test_cached_features_give_the_same_answers(
    tiny_folder: Path, tmp_path: Path, respondent: ModelRespondent, questions: list[Question],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = EvalDataConfig(root="r", feature_cache=str(tmp_path / "features"))
    cached = load(tiny_folder, config(tiny_folder, data=data, batch_size=5), questions)
    answers, losses = respondent.answers(questions, 6), respondent.answer_losses(questions)
    monkeypatch.setattr(VisionTower, "forward", lambda *_: pytest.fail("the tower ran"))
    assert cached.answers(questions, 6) == answers
    for (ours, count), (theirs, counted) in zip(cached.answer_losses(questions), losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert count == counted
    assert (cached.facts["vision_features"], respondent.facts["vision_features"]) == ("cached", "live")
