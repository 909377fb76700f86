"""What is scored over a whole benchmark rather than over single answers, and what its server is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.config import Condition, EvalConfig, EvalDataConfig
from evals.metrics import MetricName
from evals.questions import Question
from evals.runner import evaluate
from evals.submission import Layout, Outcome, laid_out
from evals.tasks.base import Respondent
from evals.tasks.mmbench import MmbenchTask
from evals.tasks.mme import MmeTask
from evals.tasks.pope import PopeTask
from evals.tasks.vqa import VqaTask


def question(name: str, reference: str | None, **meta: str) -> Question:
    return Question(name, (("user", "?"),), (), () if reference is None else (reference,), meta)


class Says(Respondent):
    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def answers(self, questions: object, max_new_tokens: int) -> list[str]:
        return list(self.texts)


def test_pope_by_category_and_over_them() -> None:
    asked = [
        question(str(n), label, kind=kind) for n, (label, kind) in enumerate([("yes", "a"), ("no", "a"), ("no", "b")])
    ]
    task = PopeTask(source={})
    aggregate = task.aggregate(asked, task.answer(asked, Says("Yes.", "yes", "No")))
    assert (aggregate["a"]["accuracy"], aggregate["a"]["precision"], aggregate["a"]["recall"]) == (0.5, 0.5, 1.0)
    assert (aggregate["b"]["accuracy"], aggregate["b"]["f1"]) == (1.0, 0.0)
    assert aggregate["mean_accuracy"] == 0.75
    strict = PopeTask(source={}, variant="lmms_eval")
    assert strict.aggregate(asked, strict.answer(asked, Says("Yes.", "yes", "No")))["a"]["TP"] == 0


def test_mme_needs_both_answers_of_an_image() -> None:
    rows = [
        ("yes", "OCR", "1"),
        ("no", "OCR", "1"),
        ("yes", "OCR", "2"),
        ("no", "OCR", "2"),
        ("yes", "code_reasoning", "3"),
    ]
    asked = [question(str(n), label, kind=kind, image=image) for n, (label, kind, image) in enumerate(rows)]
    task = MmeTask(source={})
    aggregate = task.aggregate(asked, task.answer(asked, Says("Yes", "No", "yes", "yes", "y")))
    assert aggregate == {"OCR": 75 + 50, "code_reasoning": 200, "perception": 125, "cognition": 200, "total": 325}


def test_mmbench_counts_a_question_only_where_every_turn_is_right() -> None:
    asked = [question(f"{index}/{turn}", "AB"[turn], index=str(index)) for index in (1, 2) for turn in (0, 1)]
    task = MmbenchTask(source={})
    outcomes = task.answer(asked, Says("A", "B", "A", "A"))
    assert task.aggregate(asked, outcomes) == {"questions": 2, "vanilla": 1.0, "circular": 0.5}
    without = [question("1/0", None, index="1")]
    assert task.aggregate(without, task.answer(without, Says("A"))) == {}


@pytest.mark.parametrize(
    ("layout", "name", "wanted"),
    [
        (Layout.docvqa, "49153", [{"questionId": 49153, "answer": "x"}]),
        (Layout.vqav2, "420", [{"question_id": 420, "answer": "x"}]),
        (Layout.vizwiz, "t1.jpg", [{"image": "t1.jpg", "answer": "x"}]),
        (Layout.mm_vet, "v1_0", {"v1_0": "x"}),
    ],
)
def test_what_servers_are_given(layout: Layout, name: str, wanted: object) -> None:
    assert laid_out(layout, [question(name, None)], [Outcome("x", None)]) == wanted


def test_a_submission_lies_beside_the_predictions(tmp_path: Path) -> None:
    config = EvalConfig(model="m", tasks={"t": {}}, data=EvalDataConfig(root="r"))
    task = VqaTask(source={}, metric=MetricName.vqa_accuracy, submit=Layout.vizwiz)
    (result,) = evaluate(config, {"t": (task, [question("t1.jpg", None)])}, Says("basil"), {}, tmp_path)
    assert result["score"] is None
    written = json.loads((tmp_path / "submissions" / f"t-{Condition.right.value}.json").read_text())
    assert written == [{"image": "t1.jpg", "answer": "basil"}]
