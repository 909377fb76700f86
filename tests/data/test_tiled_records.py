"""Records whose length follows from the sizes of their images: counted from headers, and true when they are encoded."""

from __future__ import annotations

from typing import Any

import pytest

from anchorformer.errors import UserError
from anchorformer.images import ImageTransform
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.tiling import Select, Tiling
from data import encoder
from data.images import load
from data.mixture import Mixture

SIZES = [(40, 20), (20, 40), (64, 64), (28, 28), (90, 30)]


@pytest.fixture
def wide(corpus: Any) -> Any:
    for number, size in enumerate(SIZES):
        corpus.image(f"{number}.png", size)
        corpus.add(number, f"{number}.png")
    corpus.image("a.png", (40, 20))
    corpus.add("two", ["a.png", "2.png"])
    corpus.add("text")
    return corpus


def tiled(processor: AnchorFormerProcessor, **values: Any) -> AnchorFormerProcessor:
    tiling = Tiling(grids=((1, 2), (2, 1), (2, 2)), **values)
    transform = ImageTransform(processor.image_transform.image_size, (0, 0, 0), tiling)
    return AnchorFormerProcessor(transform, processor.tokenizer, processor.num_image_tokens, template="chat")


def test_counted_from_headers_and_true(wide: Any, processor: AnchorFormerProcessor) -> None:
    ours = tiled(processor)
    mixture, plain = Mixture(wide.config(), ours), Mixture(wide.config(), processor)
    counts = []
    for number in range(len(mixture)):
        record = mixture[number]
        images = [load(ref) for ref in record.images]
        example = ours.encode(encoder.turns_of(record), images, sample_id=record.id)
        assert example.input_ids_S.numel() == mixture.tokens[number]
        counts.append(sum(example.tile_counts or ()))
        more = (counts[-1] - len(images)) * ours.num_image_tokens
        assert mixture.tokens[number] - plain.tokens[number] == more
    assert {3, 5, 8, 0} <= set(counts)


def test_the_length_rule_sees_tiles(wide: Any, processor: AnchorFormerProcessor) -> None:
    ours = tiled(processor)
    longest = int(Mixture(wide.config(), ours).tokens.max())
    with pytest.raises(UserError, match="own/two"):
        Mixture(wide.config(max_length=longest - 1), ours)
    left = Mixture(wide.config(max_length=longest - 1, overlength="drop", max_dropped_share=1.0), ours)
    assert "own/two" not in [left.sample_id(number) for number in range(len(left))]


def test_no_header_is_read_without_need(
    wide: Any, processor: AnchorFormerProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.images.size", lambda _: pytest.fail("a header was read"))
    for ours in (processor, tiled(processor, select=Select.image)):
        Mixture(wide.config(), ours)


def test_what_cannot_be_read_is_counted_and_left_to_its_own_rule(wide: Any, processor: AnchorFormerProcessor) -> None:
    wide.spoil("2.png", "missing")
    wide.spoil("3.png", "text")
    mixture = Mixture(wide.config(on_bad_image="skip"), tiled(processor))
    assert len(mixture) == 7
