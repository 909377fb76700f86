"""A model whose images have other numbers of embeddings under evaluation: batches, losses, caches, the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from anchorformer.answering import Answer
from anchorformer.demo.session import Session
from anchorformer.opening import open_model
from anchorformer.vision import VisionTower
from data.images import load as load_image
from evals import __main__ as command
from evals.config import EvalDataConfig
from evals.questions import Question
from evals.respondent import ModelRespondent, load
from tests.anchorformer.test_correlation import TILING, TINY
from tests.conftest import Assemble
from tests.evals.test_respondent import ask, config, in_batches_of


@pytest.fixture(scope="module")
def folder(assemble_tiny: Assemble) -> Path:
    return assemble_tiny(selector=TINY, tiling=TILING)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return [ask(number, images=(1, 0, 1, 2)[number % 4]) for number in range(8)]


@pytest.fixture(scope="module")
def respondent(folder: Path, questions: list[Question]) -> ModelRespondent:
    return load(folder, config(folder), questions)


def test_answers_and_losses_do_not_depend_on_the_batch(respondent: ModelRespondent, questions: list[Question]) -> None:
    together, one_by_one = in_batches_of(respondent, 8), in_batches_of(respondent, 1)
    answers = together.answers(questions, 6)
    assert answers == one_by_one.answers(questions, 6)
    assert len(set(answers)) > 2
    for (ours, count), (theirs, counted) in zip(
        together.answer_losses(questions), one_by_one.answer_losses(questions), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert count == counted


def test_what_an_image_takes_is_measured(respondent: ModelRespondent, questions: list[Question]) -> None:
    refs = dict.fromkeys(ref for item in questions for ref in item.images)
    looks = respondent._look({ref: load_image(ref) for ref in refs}, respondent._greedy)
    counts = [sum(each.counts) for each in looks.values()]
    assert len(set(counts)) > 1
    assert respondent.facts["visual_tokens_per_image"] == round(sum(counts) / len(counts))
    assert respondent.tokens_per_image([]) is None


def test_cached_choices_give_the_same_answers(
    folder: Path, tmp_path: Path, respondent: ModelRespondent, questions: list[Question],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    answers, losses = respondent.answers(questions, 6), respondent.answer_losses(questions)
    data = EvalDataConfig(root="r", feature_cache=str(tmp_path / "features"))
    cached = load(folder, config(folder, data=data, batch_size=3), questions)
    monkeypatch.setattr(VisionTower, "forward", lambda *_: pytest.fail("the tower ran"))
    assert cached.answers(questions, 6) == answers
    assert [ours for ours, _ in cached.answer_losses(questions)] == pytest.approx(
        [ours for ours, _ in losses], rel=1e-5
    )


@pytest.mark.slow
def test_the_command_from_a_folder_to_scores(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    rows = [{"image": f"{number}.png", "question": f"how many? {number}", "answer": "red"} for number in range(3)]
    for number, row in enumerate(rows):
        load_image(ask(number).images[0]).save(tmp_path / row["image"])
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"model={folder}", "task=custom", f"data={tmp_path / 'own.jsonl'}", f"out={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["evals", *words, f"data.cache_dir={tmp_path / 'cache'}"])
    assert command.main() == 0
    (result,) = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert result["n"] == 3
    assert result["visual_tokens_per_image"] > 1


def test_the_demo_draws_what_was_chosen(folder: Path, tmp_path: Path) -> None:
    load_image(ask(3).images[0]).save(tmp_path / "picture.png")
    opened = open_model(folder)
    session = Session(opened)
    name, most = session.trained_with
    assert (name, most) == ("correlation", 16)
    *_, shown = session.ask(str(tmp_path / "picture.png"), "what?", name, most, max_new_tokens=3)
    assert shown.row is not None
    image = load_image(ask(3).images[0])
    answer = Answer(opened.model, opened.processor, [("user", "<image>\nwhat?")], [image], max_new_tokens=3)
    counts = answer._seen.sights[0].counts
    assert shown.row[2] == sum(counts) < most * len(counts)
    assert "at most T" in shown.note
    *_, other = session.ask(str(tmp_path / "picture.png"), "what?", "average", 5, max_new_tokens=3)
    assert other.row is not None
    assert other.row[2] == 5 * len(counts)


def test_attention_lies_on_the_chosen_patches(folder: Path) -> None:
    from anchorformer.demo.seeing import NO_ANCHOR, see

    opened = open_model(folder)
    answer = Answer(opened.model, opened.processor, [("user", "<image>\nwhat?")], [load_image(ask(3).images[0])])
    assert "".join(answer) == answer.text
    sight = see(opened.model, answer)
    assert sight.heads_BP is not None
    assert sight.attention_BP is not None
    assert (sight.heads_BP != NO_ANCHOR).sum(1).tolist() == [*answer._seen.sights[0].counts]
    assert torch.equal(sight.attention_BP > 0, sight.heads_BP != NO_ANCHOR)
    assert float(sight.attention_BP.sum()) == pytest.approx(sight.image_share, abs=1e-5)
