"""Questions: what is asked of a record, and what shuffled and missing images leave of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorformer.errors import UserError
from data.record import ImageRef, Record, Role, Turn
from evals.conditions import under
from evals.config import Condition
from evals.questions import Question, question


def record(*turns: tuple[Role, str], references: tuple[str, ...] = ()) -> Record:
    return Record("r", (), tuple(Turn(role, text) for role, text in turns), references)


def asked(name: str, *images: bytes, text: str = "<image>\nwhat?") -> Question:
    return Question(name, (("user", text),), tuple(ImageRef(data=data) for data in images), ("a",), {})


def test_the_last_answer_is_asked_for_and_the_turns_before_it_stay() -> None:
    item = question(
        record((Role.system, "s"), (Role.user, "one"), (Role.assistant, "1"), (Role.user, "two"), (Role.assistant, "2"))
    )
    assert item.turns == (("system", "s"), ("user", "one"), ("assistant", "1"), ("user", "two"))
    assert item.references == ("2",)


def test_the_published_references_win_over_the_trained_answer() -> None:
    turns = ((Role.user, "q"), (Role.assistant, "a"))
    assert question(record(*turns, references=("a", "b"))).references == ("a", "b")


def test_a_split_without_answers_has_no_references() -> None:
    item = question(record((Role.user, "q")))
    assert (item.turns, item.references) == ((("user", "q"),), ())


@pytest.mark.parametrize("turns", [(), ((Role.assistant, "a"),), ((Role.system, "s"),)])
def test_a_record_that_asks_nothing_is_refused(turns: tuple[tuple[Role, str], ...]) -> None:
    with pytest.raises(UserError, match="asks nothing"):
        question(record(*turns))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 2**31))
def test_shuffled_shows_everybody_another_image_and_leaves_none_out(pictures: list[int], seed: int) -> None:
    questions = [asked(str(i), bytes([picture])) for i, picture in enumerate(pictures)]
    if len(set(pictures)) < 2:
        with pytest.raises(UserError, match="no other image"):
            under(Condition.shuffled, questions, seed)
        return
    shown = under(Condition.shuffled, questions, seed)
    pairs = {(item.images[0].data, other.images[0].data) for item, other in zip(questions, shown, strict=True)}
    assert all(own != other for own, other in pairs)
    assert len(pairs) == len(set(pictures))  # one other image per image ...
    assert {other for _, other in pairs} == {own for own, _ in pairs}  # ... and each of them shown
    assert [(item.id, item.turns) for item in shown] == [(item.id, item.turns) for item in questions]


def test_images_are_told_apart_by_content_not_by_name(tmp_path: Path) -> None:
    for name in ("a.png", "copy_of_a.png", "b.png"):
        (tmp_path / name).write_bytes(b"B" if name == "b.png" else b"A")
    questions = [
        Question(name, (), (ImageRef(path=tmp_path / name, roots=(tmp_path,)),), (), {})
        for name in ("a.png", "copy_of_a.png", "b.png")
    ]
    shown = [item.images[0].path for item in under(Condition.shuffled, questions, 0)]
    assert shown[0] == shown[1] == tmp_path / "b.png"
    assert shown[2] is not None
    assert shown[2].read_bytes() == b"A"


def test_the_seed_decides_the_order() -> None:
    questions = [asked(str(i), bytes([i])) for i in range(20)]
    orders = [[item.images for item in under(Condition.shuffled, questions, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("text", "left"),
    [("<image>\nwhat?", "what?"), ("what?\n<image>", "what?"), ("a <image> b", "a  b"), ("<image>\n<image>\nq", "q")],
)
def test_none_leaves_neither_image_nor_placeholder(text: str, left: str) -> None:
    (item,) = under(Condition.none, [asked("x", b"1", text=text)], 0)
    assert (item.images, item.turns) == ((), (("user", left),))
