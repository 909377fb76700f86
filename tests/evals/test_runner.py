"""A whole evaluation with a stand-in model: what is scored, what is written, and what is never half-written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anchorformer.errors import UserError
from data.record import ImageRef
from evals import results
from evals.config import Condition, EvalConfig, EvalDataConfig
from evals.metrics import MetricName
from evals.questions import Question
from evals.runner import evaluate, line
from evals.submission import Outcome
from evals.tasks.base import TaskConfig
from evals.tasks.caption_loss import CaptionLossTask
from evals.tasks.chartqa import ChartqaTask
from evals.tasks.docvqa import DocvqaTask
from evals.tasks.vqa import VqaTask


class Parrot:
    """Answers with what the image's bytes say, and "blind" without an image."""

    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        return [item.images[0].data.decode() if item.images else "blind" for item in questions]  # type: ignore[union-attr]

    def answer_losses(self, questions: Sequence[Question]) -> list[tuple[float, int]]:
        return [(2.0, 4) if item.images[0].data == item.references[0].encode() else (30.0, 10) for item in questions]


def questions(*answers: str, group: str | None = None) -> list[Question]:
    meta = {} if group is None else {"kind": group}
    return [
        Question(f"q{i}", (("user", "<image>\n?"),), (ImageRef(data=answer.encode()),), (answer,), meta)
        for i, answer in enumerate(answers)
    ]


def config(*conditions: Condition) -> EvalConfig:
    return EvalConfig(model="m", tasks={"t": {}}, data=EvalDataConfig(root="r"), conditions=conditions)


def run(tmp_path: Path, task: TaskConfig, asked: list[Question], *conditions: Condition) -> list[dict[str, Any]]:
    return list(evaluate(config(*conditions), {"t": (task, asked)}, Parrot(), {"template": "v1"}, tmp_path))


def test_the_right_image_scores_and_the_baselines_do_not(tmp_path: Path) -> None:
    shown = run(tmp_path, VqaTask(source={}), questions("red", "blue", "two"), *Condition)
    assert {result["condition"]: result["score"] for result in shown} == {"right": 1.0, "shuffled": 0.0, "none": 0.0}


def test_predictions_and_result_belong_together(tmp_path: Path) -> None:
    (result,) = run(tmp_path, DocvqaTask(source={"file": "f"}), questions("ann", "bob"), Condition.right)
    predictions, stored = results.paths(tmp_path, "t", Condition.right)
    assert json.loads(stored.read_text()) == result
    assert result["predictions_sha256"] == hashlib.sha256(predictions.read_bytes()).hexdigest()
    rows = [json.loads(row) for row in predictions.read_text().splitlines()]
    assert [(row["id"], row["prediction"], row["references"], row["score"]) for row in rows] == [
        ("q0", "ann", ["ann"], 1.0),
        ("q1", "bob", ["bob"], 1.0),
    ]
    assert len({row["prompt_sha256"] for row in rows}) == 1
    assert result["template"] == "v1"
    assert result["metric"] == "anls"
    assert "lmms-eval" in result["metric_variant"]
    assert result["decoding"] == {"method": "greedy", "max_new_tokens": 32}
    assert result["first_prompt"] == [["user", "<image>\n?"]]
    assert not list(tmp_path.glob("*.tmp"))


def test_chartqa_is_also_reported_by_who_asked(tmp_path: Path) -> None:
    asked = questions("1", "2", "3", group="human") + questions("10", group="augmented")
    asked[0] = Question("wrong", asked[0].turns, asked[0].images, ("100",), {"kind": "human"})
    (result,) = run(tmp_path, ChartqaTask(source={}), asked, Condition.right)
    assert result["score"] == pytest.approx(3 / 4)
    assert result["groups"]["human"] == {"n_scored": 3, "score": pytest.approx(2 / 3)}
    assert result["groups"]["augmented"] == {"n_scored": 1, "score": 1.0}
    assert result["mean_of_groups"] == pytest.approx(5 / 6)


def test_a_split_without_answers_is_predicted_but_not_scored(tmp_path: Path) -> None:
    asked = [Question("x", (("user", "?"),), (ImageRef(data=b"seen"),), (), {})]
    (result,) = run(tmp_path, DocvqaTask(source={}), asked, Condition.right)
    assert (result["n"], result["n_scored"], result["score"]) == (1, 0, None)
    assert "no published answers" in line(result)
    assert json.loads(results.paths(tmp_path, "t", Condition.right)[0].read_text())["prediction"] == "seen"


def test_caption_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    asked = questions("a", "b")
    shown = run(tmp_path, CaptionLossTask(source={}), asked, Condition.right, Condition.shuffled)
    assert [result["score"] for result in shown] == [pytest.approx(0.5), pytest.approx(3.0)]
    mixed = [Outcome(None, 0.5, 4), Outcome(None, 3.0, 10)]
    assert results.summarise(mixed, [None, None])["score"] == pytest.approx((2.0 + 30.0) / 14)


def test_a_part_of_a_task_never_replaces_the_whole(tmp_path: Path) -> None:
    task, asked = VqaTask(source={}), questions("a", "b")
    (whole,) = run(tmp_path, task, asked, Condition.right)
    part = replace(config(Condition.right), limit=1)
    (result,) = evaluate(part, {"t": (task, asked[:1])}, Parrot(), {}, tmp_path)
    assert (whole["limit"], result["limit"], result["n"]) == (None, 1, 1)
    predictions, stored = results.paths(tmp_path, "t", Condition.right)
    assert json.loads(stored.read_text()) == whole
    assert whole["predictions_sha256"] == hashlib.sha256(predictions.read_bytes()).hexdigest()
    assert result["predictions"] == "t-right-limit1.jsonl"


def test_an_old_score_never_stands_beside_new_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = questions("a", "b")
    run(tmp_path, VqaTask(source={}), asked, Condition.right)
    predictions, stored = results.paths(tmp_path, "t", Condition.right)
    before = predictions.read_bytes()

    def fail(*_: object, **__: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("evals.results.prompt_digest", fail)
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, VqaTask(source={}), asked, Condition.right)
    assert not stored.exists()
    assert predictions.read_bytes() == before


def test_a_metric_is_chosen_by_name(tmp_path: Path) -> None:
    asked = questions("10.4")
    asked[0] = Question("x", asked[0].turns, asked[0].images, ("10",), {})
    for metric, score in ((MetricName.exact_match, 0.0), (MetricName.relaxed_accuracy, 1.0), (MetricName.anls, 0.5)):
        (result,) = run(tmp_path, VqaTask(source={}, metric=metric), asked, Condition.right)
        assert (result["metric"], result["score"]) == (metric.value, pytest.approx(score))


@pytest.mark.parametrize(
    "values",
    [{"tasks": {}}, {"batch_size": 0}, {"limit": 0}, {"conditions": ()}, {"conditions": (Condition.right,) * 2}],
)
def test_a_config_that_asks_for_nothing_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        EvalConfig(**{"model": "m", "tasks": {"t": {}}, "data": EvalDataConfig(root="r"), **values})
