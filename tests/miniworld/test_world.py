"""Changes when what the world shows, says or asks changes."""

from __future__ import annotations

import random

import numpy as np
import pytest

from miniworld.charts import Bars, Lines, Pie
from miniworld.documents import Form, Receipt
from miniworld.pictures import COLORS, SIZE
from miniworld.scenes import Scene
from miniworld.world import DOMAINS, Entry, Split, belongs_to, entry


def some(domain: str, split: Split = Split.train, count: int = 150, stream: str = "test") -> list[Entry]:
    return [entry(domain, split, stream, index) for index in range(count)]


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_same_key_gives_the_same_picture_and_another_stream_another(domain: str) -> None:
    first, again, other = some(domain), some(domain), some(domain, stream="other")
    assert [e.caption for e in first] == [e.caption for e in again]
    assert [e.questions() for e in first] == [e.questions() for e in again]
    for a, b in zip(first[:20], again[:20], strict=True):
        assert np.array_equal(np.asarray(a.draw()), np.asarray(b.draw()))
    assert sum(a.caption == b.caption for a, b in zip(first, other, strict=True)) < 15


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_contents_never_occur_in_training(domain: str) -> None:
    trained = {e.caption for e in some(domain, Split.train, 400)}
    held_out = {e.caption for e in some(domain, Split.val, 400, "elsewhere")}
    assert not trained & held_out
    assert {belongs_to(caption) for caption in held_out} == {Split.val}


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_pictures_look_like_training_pictures(domain: str) -> None:
    # The split goes by content, so simple contents (a single shape, a single line) must be in both.
    lengths = [np.mean([len(e.caption.split()) for e in some(domain, split, 600)]) for split in Split]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)


@pytest.mark.parametrize("domain", DOMAINS)
def test_pictures_fill_the_square_with_more_than_one_colour(domain: str) -> None:
    for item in some(domain, count=30):
        image = item.draw()
        assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")
        assert len(image.getcolors(SIZE * SIZE) or []) > 1


def test_answers_follow_from_what_is_shown() -> None:
    """Every answer is worked out again from the description by other means."""
    for domain in DOMAINS:
        for item in some(domain, count=300):
            for question in item.questions():
                assert question.answer in expected(item, question.text), (item.caption, question)


def expected(item: Entry, text: str) -> set[str]:
    picture, words = item.picture, text.rstrip("?").split()
    if isinstance(picture, Scene):
        by_shape = {t.shape: t for t in picture.things}
        if text.startswith("how many"):
            return {str(len(by_shape))}
        if text.startswith("is there"):
            found = words[-1] in by_shape and by_shape[words[-1]].color == words[3]
            return {"yes" if found else "no"}
        if text.startswith("what shape"):
            return {t.shape for t in picture.things if t.color == words[-1]}
        thing = by_shape[words[-1]]
        return {{"what color": thing.color, "where is": thing.place, "what size": thing.size}[" ".join(words[:2])]}
    if isinstance(picture, (Bars, Pie, Lines)):
        pairs = dict(getattr(picture, {Bars: "values", Pie: "shares", Lines: "trends"}[type(picture)]))
        if text.startswith("how many"):
            return {str(len(pairs))}
        if text.startswith("what kind"):
            return {{Bars: "bar", Pie: "pie", Lines: "line"}[type(picture)]}
        if words[-1] in ("tallest", "largest"):
            return {color for color in pairs if pairs[color] == max(pairs.values())}
        if words[-1] in ("shortest", "smallest"):
            return {color for color in pairs if pairs[color] == min(pairs.values())}
        if "taller" in words:
            return {"yes" if pairs[words[1]] > pairs[words[-1]] else "no"}
        return {str(pairs[words[-1]])}
    if isinstance(picture, Receipt):
        prices = dict(picture.items)
        facts = {"total": str(sum(prices.values())), "shop": picture.shop, "there": str(len(prices))}
        return {facts[words[-1]] if words[-1] in facts else str(prices[words[-1]])}
    assert isinstance(picture, Form)
    return {dict(picture.fields)[words[-1]]}


def test_half_of_the_existence_questions_are_wrong_and_half_of_those_name_a_colour_that_is_there() -> None:
    answers, tempting = [], 0
    for item in some("scene", count=2000):
        colors = {word for word in item.caption.replace(",", " ").replace(".", " ").split() if word in COLORS}
        for question in item.questions():
            if question.template == "scene/exists":
                answers.append(question.answer)
                tempting += question.answer == "no" and question.text.split()[3] in colors
    share = answers.count("no") / len(answers)
    assert share == pytest.approx(0.5, abs=0.05)
    # One in four scenes has a single shape and so no other colour to tempt with.
    assert tempting / answers.count("no") == pytest.approx(0.375, abs=0.06)


def test_captions_name_every_shape_at_the_place_where_pixels_are() -> None:
    """Planted shapes are found again in the pixels of their cell, in their colour."""
    places = ("top", "middle", "bottom"), ("left", "center", "right")
    for item in some("scene", count=60):
        assert isinstance(item.picture, Scene)
        pixels = np.asarray(item.draw()).astype(int)
        for thing in item.picture.things:
            row, column = (axis.index(word) for axis, word in zip(places, thing.place.split(), strict=True))
            cell = pixels[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
            near = np.abs(cell - np.array(COLORS[thing.color])).max(-1) <= 14
            assert near.sum() >= 30, item.caption


def test_bars_are_as_tall_as_their_values() -> None:
    bars = Bars((("red", 2), ("green", 7), ("blue", 4)))
    pixels = np.asarray(bars.draw(random.Random(0))).astype(int)
    heights = [(np.abs(pixels - np.array(COLORS[color])).max(-1) <= 14).any(1).sum() / 9 for color, _ in bars.values]
    assert heights == pytest.approx([2, 7, 4], abs=0.25)


def test_documents_stay_inside_their_paper() -> None:
    # 16 columns and 8 rows: text that runs over the edge would be asked about without being visible.
    for item in some("doc", count=300):
        picture = item.picture
        if isinstance(picture, Form):
            assert max(6 + len(value) for _, value in picture.fields) + 2 <= 16
        else:
            assert isinstance(picture, Receipt)
            assert 4 + 8 + len(str(picture.total)) <= 16
            assert 4 + 2 + len(picture.shop) <= 16
