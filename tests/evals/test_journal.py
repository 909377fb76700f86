"""Evaluations that are killed, or shared out and put together: each question is asked once, the scores are the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorformer.errors import UserError
from data.record import ImageRef
from evals.config import Condition, EvalConfig, EvalDataConfig
from evals.journal import Journal
from evals.metrics import MetricName
from evals.questions import Question
from evals.runner import answer_share, evaluate, put_together
from evals.tasks.caption_loss import CaptionLossTask
from evals.tasks.vqa import VqaTask
from evals.workers import environment, run_shares

FACTS = {"model_sha256": "0" * 64, "template": "v1", "machine": "here", "precision": "fp32"}


class Counting:
    """Answers with the question's id; is killed, in a manner of speaking, when it has answered `patience` of them."""

    def __init__(self, patience: int = 10**9) -> None:
        self.asked: list[str] = []
        self._patience = patience

    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        self._count(questions)
        return [item.id for item in questions]

    def answer_losses(self, questions: Sequence[Question]) -> list[tuple[float, int]]:
        self._count(questions)
        return [(float(len(item.id)), 2) for item in questions]

    def _count(self, questions: Sequence[Question]) -> None:
        if len(self.asked) + len(questions) > self._patience:
            raise KeyboardInterrupt
        self.asked += [item.id for item in questions]


def questions(count: int) -> list[Question]:
    return [Question(f"q{n}", (("user", "?"),), (), (f"q{n - n % 3}",), {}) for n in range(count)]


def config(**values: Any) -> EvalConfig:
    return EvalConfig(model="m", tasks={"t": {}}, data=EvalDataConfig(root="r"), **{"batch_size": 2, **values})


def run(out: Path, task: Any, count: int, respondent: Counting, **values: Any) -> list[dict[str, Any]]:
    return list(evaluate(config(**values), {"t": (task, questions(count))}, respondent, FACTS, out))


def without_time(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in ("time", "ranks", "batch_size")}


@pytest.mark.parametrize("task", [VqaTask(source={}, metric=MetricName.anls), CaptionLossTask(source={})])
@pytest.mark.parametrize("patience", [0, 2, 4])
def test_what_was_answered_is_not_asked_again(tmp_path: Path, task: Any, patience: int) -> None:
    whole = run(tmp_path / "whole", task, 5, Counting())
    first = Counting(patience)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", task, 5, first)
    assert not (tmp_path / "two" / "t-right.json").exists()
    second = Counting()
    again = run(tmp_path / "two", task, 5, second)
    assert first.asked + second.asked == [f"q{n}" for n in range(5)]
    assert len(first.asked) == patience
    assert [without_time(result) for result in again] == [without_time(result) for result in whole]
    assert again[0]["time"].get("answered_before", 0) == patience
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["t-right.json", "t-right.jsonl"]


@pytest.mark.parametrize(
    "changed",
    [{"facts": {**FACTS, "model_sha256": "1" * 64}}, {"seed": 1}, {"task": VqaTask(source={}, max_new_tokens=3)}],
)
def test_answers_of_another_model_or_prompt_are_none(tmp_path: Path, changed: dict[str, Any]) -> None:
    task, asked = VqaTask(source={}), questions(4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, task, 4, Counting(2))
    respondent = Counting()
    facts, task = changed.get("facts", FACTS), changed.get("task", task)
    list(evaluate(config(seed=changed.get("seed", 0)), {"t": (task, asked)}, respondent, facts, tmp_path))
    assert len(respondent.asked) == 4


@pytest.mark.parametrize("changed", [{"machine": "there"}, {"batch_size": 3}, {"vision_features": "cached"}])
@pytest.mark.parametrize(("precision", "left"), [("fp32", ["q2", "q3"]), ("bf16", ["q0", "q1", "q2", "q3"])])
def test_another_machine_or_batch_size_goes_on_with_the_answers_where_it_rounds_alike(
    tmp_path: Path, precision: str, left: list[str], changed: dict[str, Any]
) -> None:
    facts = {**FACTS, "precision": precision, "batch_size": 2}
    asked = {"t": (VqaTask(source={}), questions(4))}
    with pytest.raises(KeyboardInterrupt):
        list(evaluate(config(), asked, Counting(2), facts, tmp_path))
    respondent = Counting()
    list(evaluate(config(), asked, respondent, {**facts, **changed}, tmp_path))
    assert respondent.asked == left


def test_an_answer_about_an_image_that_was_replaced_is_none(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"one")

    def answer(patience: int, data: bytes, condition: Condition) -> list[str]:
        refs = ImageRef(path=picture), ImageRef(data=data)
        asked = [replace(item, images=refs) for item in questions(4)]
        respondent = Counting(patience)
        list(evaluate(config(conditions=(condition,)), {"t": (VqaTask(source={}), asked)}, respondent, FACTS, tmp_path))
        return respondent.asked

    for condition in (Condition.right, Condition.none):
        picture.write_bytes(b"one")
        os.utime(picture, (0, 0))
        with pytest.raises(KeyboardInterrupt):
            answer(2, b"first", condition)
        with pytest.raises(KeyboardInterrupt):
            answer(0, b"first", condition)  # the same images: what is known stays
        assert len(answer(9, b"second", condition)) == (4 if condition is Condition.right else 2)
        with pytest.raises(KeyboardInterrupt):
            answer(2, b"first", condition)
        picture.write_bytes(b"two")
        assert len(answer(9, b"first", condition)) == (4 if condition is Condition.right else 2)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_time_is_that_of_the_last_attempt_and_of_what_it_has_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    now = [1000.0]
    monkeypatch.setattr("evals.journal.time.time", lambda: now[0])

    class Slow(Counting):
        def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
            said = super().answers(questions, max_new_tokens)
            now[0] += 5 * len(said)
            return said

    prepared = {"t": (VqaTask(source={}), questions(10))}
    for share, patience in enumerate((4, 2)):
        with pytest.raises(KeyboardInterrupt):
            answer_share(config(ranks=2), prepared, Slow(patience), FACTS, tmp_path, share)
    now[0] += 3600
    facts, last = {**FACTS, "machine": "there"}, config(ranks=ranks)
    if ranks == 1:
        (result,) = evaluate(last, prepared, Slow(), facts, tmp_path)
    else:
        for share in range(ranks):
            answer_share(last, prepared, Slow(), facts, tmp_path, share)
        (result,) = put_together(last, prepared, tmp_path)
    # Of ten the places 0, 2, 4, 6 and 1, 3 were answered; 5, 7, 8 and 9 are left.
    slowest = {1: 4, 2: 3, 3: 2}[ranks]
    assert (result["ranks"], result["machine"]) == (ranks, "there")
    assert result["time"] == {
        "seconds": 5.0 * slowest, "questions_per_second": round(4 / (5 * slowest), 2), "answered_before": 6,
    }  # fmt: skip


def test_a_result_of_answers_that_were_all_there_took_no_time(tmp_path: Path) -> None:
    shared, prepared = config(ranks=2), {"t": (VqaTask(source={}), questions(4))}
    for _ in range(2):
        for share in range(2):
            answer_share(shared, prepared, Counting(4), FACTS, tmp_path, share)
    (result,) = put_together(shared, prepared, tmp_path)
    assert (result["time"]["seconds"], result["time"]["answered_before"]) == (0, 4)


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(min_value=0, max_value=400))
def test_a_file_cut_anywhere_loses_the_last_answers_only(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    out = tmp_path_factory.mktemp("cut")
    with pytest.raises(KeyboardInterrupt):
        run(out, VqaTask(source={}), 6, Counting(4))
    (journal,) = out.glob("*.partial-*.jsonl")
    content = journal.read_bytes()
    journal.write_bytes(content[: max(0, len(content) - cut)])
    respondent = Counting()
    (result,) = run(out, VqaTask(source={}), 6, respondent)
    assert result["n"] == 6
    assert respondent.asked[-2:] == ["q4", "q5"]
    assert respondent.asked == [f"q{n}" for n in range(6 - len(respondent.asked), 6)]


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_shares_come_to_the_same_result(tmp_path: Path, ranks: int) -> None:
    task, shared = VqaTask(source={}, metric=MetricName.anls), config(ranks=ranks)
    prepared = {"t": (task, questions(5))}
    whole = run(tmp_path / "whole", task, 5, Counting())
    for share in range(ranks):
        answer_share(shared, prepared, Counting(), FACTS, tmp_path / "shares", share)
    together = list(put_together(shared, prepared, tmp_path / "shares"))
    assert [without_time(result) for result in together] == [without_time(result) for result in whole]
    for name in ("t-right.jsonl", "t-right.json"):
        assert (tmp_path / "shares" / name).is_file()


def test_a_share_that_is_missing_is_no_result(tmp_path: Path) -> None:
    shared, prepared = config(ranks=2), {"t": (VqaTask(source={}), questions(5))}
    answer_share(shared, prepared, Counting(), FACTS, tmp_path, 0)
    with pytest.raises(UserError, match="2 of 5"):
        list(put_together(shared, prepared, tmp_path))
    assert not (tmp_path / "t-right.json").exists()
    respondent = Counting()
    answer_share(shared, prepared, respondent, FACTS, tmp_path, 1)
    assert respondent.asked == ["q1", "q3"]


def test_conditions_keep_journals_of_their_own(tmp_path: Path) -> None:
    task, asked = VqaTask(source={}), questions(4)
    stems = [tmp_path / f"t-{condition.value}" for condition in (Condition.right, Condition.none)]
    settings = {**task.describe(), **FACTS}
    journals = [Journal(stem, {**settings, "condition": stem.name}, asked) for stem in stems]
    for journal in journals:
        journal.begin()
    journals[0].append({0: "x"})
    assert Journal(stems[1], {**settings, "condition": stems[1].name}, asked).known == {}
    assert Journal(stems[0], {**settings, "condition": stems[0].name}, asked).known == {0: "x"}


def test_cards_and_cores_are_shared_out() -> None:
    environments = [environment({"CUDA_VISIBLE_DEVICES": "3,5"}, share, 2, 2) for share in range(2)]
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in environments] == ["3", "5"]
    assert environment({}, 1, 2, 8)["CUDA_VISIBLE_DEVICES"] == "1"
    assert "TQDM_DISABLE" not in environment({}, 0, 2, 0)
    assert int(environment({}, 0, 10**6, 0)["OMP_NUM_THREADS"]) == 1
    with pytest.raises(UserError, match=r"ranks=3, 2 visible"):
        run_shares([], 3, 2)


@pytest.fixture
def asked_of(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Words of a command that asks a real model forty questions without images."""
    rows = [{"image": "a.png", "question": f"what is {n}?", "answer": "a"} for n in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"model={tiny_folder}", "task=custom", f"data={tmp_path}/mine.jsonl", f"data.cache_dir={tmp_path}/cache",
        "conditions=none", "batch_size=1", "tasks.custom.max_new_tokens=4",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_command_goes_on_and_two_ranks_say_the_same(asked_of: list[str], tmp_path: Path) -> None:
    def command(name: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "evals", *asked_of, f"out={tmp_path / name}", *more]

    subprocess.run(command("whole"), check=True, timeout=120)
    subprocess.run(command("shares", "ranks=2"), check=True, timeout=180)
    process = subprocess.Popen(command("killed", "ranks=2"), start_new_session=True)
    partial = tmp_path / "killed" / "custom-none.partial-1.jsonl"
    deadline = time.monotonic() + 120
    while not (partial.is_file() and partial.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "custom-none.json").exists()
    subprocess.run(command("killed"), check=True, timeout=120)
    lines = [(tmp_path / name / "custom-none.jsonl").read_text() for name in ("whole", "shares", "killed")]
    assert lines[0] == lines[1] == lines[2]
    assert json.loads((tmp_path / "killed" / "custom-none.json").read_text())["time"]["answered_before"] >= 3


def test_fewer_questions_than_ranks(tmp_path: Path) -> None:
    shared = replace(config(), ranks=3)
    prepared = {"t": (VqaTask(source={}), questions(1))}
    for share in range(3):
        answer_share(shared, prepared, Counting(), FACTS, tmp_path, share)
    ((result),) = put_together(shared, prepared, tmp_path)
    assert result["n"] == 1
