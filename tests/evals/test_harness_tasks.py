"""Local tasks for lmms-eval, as far as they can be seen without it: what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from anchorformer.errors import UserError
from anchorformer.harness import documents
from anchorformer.harness.requests import MAX_NEW_TOKENS, Decoding, from_text
from data.record import ImageRef
from evals.harness.__main__ import compose_config
from evals.harness.writing import SCORES, write_task
from evals.metrics import MetricName
from evals.questions import Question
from evals.tasks.caption_loss import CaptionLossTask
from evals.tasks.docvqa import DocvqaTask
from evals.tasks.vqa import VqaTask


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 6)).save(path)
    return path


def asking(text: str, *refs: ImageRef, references: tuple[str, ...] = ("a", "b")) -> Question:
    return Question("q1", (("user", text),), refs, references, {"kind": "human"})


def test_a_task_is_lines_of_questions_and_the_file_that_reads_them(tmp_path: Path, picture: Path) -> None:
    refs = ImageRef(path=picture), ImageRef(data=picture.read_bytes())
    question = asking("<image>\n<image>\nWhat?\nIn one word.", *refs)
    out = tmp_path / "out"
    assert write_task("docs", DocvqaTask(source={}), [question], out) == "local_docs"
    (row,) = map(json.loads, (out / "docs.jsonl").read_text().splitlines())
    assert (row["question_id"], row["question"], row["answers"]) == ("q1", "What?\nIn one word.", ["a", "b"])
    assert [image.size for image in documents.to_visual(row)] == [(8, 6), (8, 6)]
    assert documents.to_text(row, {"post_prompt": "?"}) == "What?\nIn one word."
    described = yaml.load((out / "docs.yaml").read_text(), _Tagless)
    assert described["dataset_kwargs"] == {"data_files": {"test": "docs.jsonl"}}
    assert described["generation_kwargs"] == {"max_new_tokens": 32, "temperature": 0, "do_sample": False, "until": []}
    assert not list(out.glob("*.tmp"))


class _Tagless(yaml.SafeLoader):
    """Takes the functions of a task file for their names."""


_Tagless.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_every_metric_has_its_score_in_lmms_eval() -> None:
    assert {path.stem for path in SCORES.glob("*.yaml")} == {name.value for name in MetricName}


@pytest.mark.parametrize(
    ("question", "metric", "message"),
    [
        (asking("What?", references=()), "anls", "0 reference"),
        (asking("What?"), "relaxed_accuracy", "2 reference"),
        (Question("q", (("system", "s"), ("user", "What?")), (), ("a",), {}), "anls", "2 turn"),
        (asking("What is in <image>?", ImageRef(data=b"x")), "anls", "images in front"),
        (asking("<image>\nWhat?", ImageRef(path=Path("gone.png"))), "anls", "no such image"),
    ],
)
def test_what_has_no_form_there_is_refused_and_nothing_written(
    question: Question, metric: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        write_task("t", VqaTask(source={}, metric=MetricName(metric)), [question], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_task_of_losses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no form in lmms-eval"):
        write_task("t", CaptionLossTask(source={}), [], tmp_path)


def test_the_command_composes_several_tasks() -> None:
    config = compose_config(["task=[docvqa_val,pope]", "data.root=r", "out=o", "tasks.pope.max_new_tokens=3"])
    assert (list(config.tasks), config.tasks["pope"]["max_new_tokens"], config.out) == (["docvqa_val", "pope"], 3, "o")
    with pytest.raises(UserError, match="'docvqa_val'"):
        compose_config(["task=docvqa_vla", "data.root=r", "out=o"])


def test_images_stand_in_front_unless_the_text_says_where() -> None:
    image = Image.new("RGB", (2, 2))
    assert from_text("What?", [image, image]).turns == (("user", "<image>\n<image>\nWhat?"),)
    assert from_text("In <image> what?", [image]).turns == (("user", "In <image> what?"),)
    assert from_text("What?", None) == ((("user", "What?"),), [])
    with pytest.raises(UserError, match=r"1 <image>, 2 image\(s\)"):
        from_text("In <image> what?", [image, image])
    with pytest.raises(UserError, match="images only"):
        from_text("What?", ["film.mp4"])


def test_generation_kwargs() -> None:
    greedy = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, "do_sample": False}
    assert Decoding.read({}) == Decoding(greedy, ())
    foreign = {"temperature": 0, "do_sample": True, "top_p": 0, "image_aspect_ratio": "pad", "until": None}
    assert Decoding.read(foreign) == Decoding(greedy, ())
    assert Decoding.read({"temperature": 0.7, "do_sample": False}).arguments == greedy
    sampled = Decoding.read({"temperature": 0.7, "max_new_tokens": 5, "num_beams": 2}).arguments
    assert sampled == {"max_new_tokens": 5, "num_beams": 2, "do_sample": True, "temperature": 0.7, "top_p": 1.0}
    until = Decoding.read({"until": ["\n\n", "USER:", ""]})
    assert until.until == ("\n\n", "USER:")
    assert until.cut(" two USER: a\n\nb") == "two"
    assert Decoding.read({"until": "."}).cut("yes. no.") == "yes"
