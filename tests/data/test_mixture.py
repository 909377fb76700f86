"""Lengths, the over-length rule and weights: which records an epoch holds, and what is said about the others."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from anchorformer.contracts import IGNORE_INDEX
from anchorformer.errors import UserError
from anchorformer.processing import AnchorFormerProcessor
from data import lengths
from data.config import Overlength
from data.encoder import fingerprint, turns_of
from data.mixture import Mixture, open_sources

LLAVA = {"_target_": "data.sources.llava.LlavaConfig"}


def test_tokens_are_what_encode_gives(filled: Any, processor: AnchorFormerProcessor) -> None:
    mixture = Mixture(filled.config(), processor)
    assert len(mixture) == 12
    for number in range(12):
        record = mixture[number]
        assert record.id == mixture.sample_id(number) == f"own/{number}"
        assert mixture.tokens[number] == processor.measure(turns_of(record), len(record.images)).length


def test_more_anchors_are_counted(filled: Any, processor: AnchorFormerProcessor) -> None:
    wider = AnchorFormerProcessor(processor.image_transform, processor.tokenizer, num_image_tokens=50, template="chat")
    few, many = Mixture(filled.config(), processor), Mixture(filled.config(), wider)
    added = (many.tokens - few.tokens).tolist()
    assert added == [0 if number % 3 == 2 else 50 - processor.num_image_tokens for number in range(12)]


def test_lengths_are_counted_once_per_processor(
    filled: Any, processor: AnchorFormerProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = filled.config()
    first = Mixture(config, processor)
    assert fingerprint(processor) != fingerprint(processor.with_template("v1"))
    monkeypatch.setattr(lengths, "_count", lambda *_: pytest.fail("counted again"))
    assert Mixture(config, processor).tokens.tolist() == first.tokens.tolist()
    with pytest.raises(pytest.fail.Exception):
        Mixture(config, processor.with_template("v1"))


@pytest.mark.slow
def test_processes_count_the_same(
    filled: Any, processor: AnchorFormerProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(300):
        filled.add(f"more{index}", None, "why?", "b" * index)
    ((source, _),) = open_sources(filled.config())
    every = range(len(source))
    whole, cut = (lengths._count(source, processor, every, limit, 1) for limit in (None, 100))
    assert cut[0].max() <= 100 < whole[0].max()
    monkeypatch.setattr(lengths, "CHUNK", 50)
    assert lengths._count(source, processor, every, None, 2).tolist() == whole.tolist()
    assert lengths._count(source, processor, every, 100, 2).tolist() == cut.tolist()


@pytest.mark.parametrize(("cpus", "records", "processes"), [
    (256, 0, 1), (256, 19_999, 1), (256, 25_000, 2), (256, 158_000, 15), (256, 665_000, 32), (2, 665_000, 2),
])  # fmt: skip
def test_processes_are_no_more_than_are_worth_starting(
    monkeypatch: pytest.MonkeyPatch, cpus: int, records: int, processes: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cpus)))
    assert lengths._processes(records) == processes


def _long_prompt_and_long_answer(corpus: Any) -> None:
    corpus.image("a.png")
    for index in range(8):
        corpus.add(f"fits{index}", "a.png", "short?", "yes")
    corpus.add("long answer", "a.png", "tell me", "word " * 40)
    corpus.add("long prompt", "a.png", "word " * 40, "yes")


def test_error_names_ids_and_lengths(corpus: Any, processor: AnchorFormerProcessor) -> None:
    _long_prompt_and_long_answer(corpus)
    with pytest.raises(UserError, match="are longer than") as caught:
        Mixture(corpus.config(max_length=60), processor)
    assert "own/long answer (" in caught.value.found
    assert "own/long prompt (" in caught.value.found
    assert caught.value.what.startswith("2 record(s)")


def test_drop_is_counted_and_has_a_ceiling(corpus: Any, processor: AnchorFormerProcessor) -> None:
    _long_prompt_and_long_answer(corpus)
    mixture = Mixture(corpus.config(max_length=60, overlength="drop", max_dropped_share=0.2), processor)
    assert (len(mixture), mixture.num_dropped) == (8, 2)
    assert mixture.tokens.max() <= 60
    with pytest.raises(UserError, match="too many records") as caught:
        Mixture(corpus.config(max_length=60, overlength="drop", max_dropped_share=0.19), processor)
    assert "2 of 10; own: 2 too long (long answer, long prompt)" in caught.value.found


def test_truncating_keeps_all_anchors_and_a_target(corpus: Any, processor: AnchorFormerProcessor) -> None:
    _long_prompt_and_long_answer(corpus)
    mixture = Mixture(corpus.config(max_length=60, overlength="truncate_answer", max_dropped_share=0.1), processor)
    names = [mixture.sample_id(number) for number in range(len(mixture))]
    assert names[-1] == "own/long answer"
    assert mixture.num_dropped == 1, "cutting the long prompt would leave nothing to learn"
    record = mixture[len(names) - 1]
    example = processor.encode(
        turns_of(record), [_white()], sample_id="x", max_length=60, overlength=Overlength.truncate_answer.value
    )
    assert example.input_ids_S.numel() == mixture.tokens[len(names) - 1] == 60
    assert (example.input_ids_S == processor.image_token_id).sum() == processor.num_image_tokens
    assert (example.labels_S != IGNORE_INDEX).any()


def test_shortened_lengths_are_counted_once_per_limit(
    corpus: Any, processor: AnchorFormerProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _long_prompt_and_long_answer(corpus)

    def tokens(max_length: int) -> list[int]:
        rules = {"overlength": "truncate_answer", "max_dropped_share": 0.2}
        mixture: list[int] = Mixture(corpus.config(max_length=max_length, **rules), processor).tokens.tolist()
        return mixture

    first, count, asked = tokens(60), lengths._count, []
    monkeypatch.setattr(lengths, "_count", lambda *args: asked.append(args[2]) or count(*args))  # type: ignore[func-returns-value]
    assert tokens(60) == first
    assert asked == [], "neither the whole records nor the shortened ones"
    assert max(tokens(70)) == 70 > max(first)
    assert asked == [[8, 9]], "only the records that are too long"


def _white() -> Any:
    from PIL import Image

    return Image.new("RGB", (3, 3), "white")


def test_records_without_targets_are_left_out(corpus: Any, processor: AnchorFormerProcessor) -> None:
    for index in range(9):
        corpus.add(index)
    corpus.records.append({"id": "asks", "conversations": [{"from": "human", "value": "hello?"}]})
    mixture = Mixture(corpus.config(max_dropped_share=0.1), processor)
    assert (len(mixture), mixture.num_dropped) == (9, 1)
    corpus.records[:9] = []
    with pytest.raises(UserError, match="too many") as caught:
        Mixture(corpus.config(max_dropped_share=1.0), processor)
    assert "1 without targets (asks)" in caught.value.found


@pytest.mark.parametrize("marks", [0, 2])
def test_count_mismatch_names_the_record(corpus: Any, processor: AnchorFormerProcessor, marks: int) -> None:
    corpus.add("fine")
    corpus.add("crooked", "a.png")
    corpus.records[-1]["conversations"][0]["value"] = "<image>" * marks + "what?"
    with pytest.raises(UserError, match="own/crooked") as caught:
        Mixture(corpus.config(), processor)
    assert str(marks) in caught.value.found


def test_weights_are_passes_per_epoch(filled: Any, processor: AnchorFormerProcessor) -> None:
    spec = filled.write()
    sources = {
        "half": {**spec, "weight": 0.5}, "once": spec, "more": {**spec, "weight": 2.25}, "never": {**spec, "weight": 0},
    }  # fmt: skip
    mixture = Mixture(filled.config(sources=sources), processor)
    assert len(mixture) == 6 + 12 + 27
    epochs = [Counter(mixture.sample_id(n) for n in mixture.epoch(epoch, seed=4).tolist()) for epoch in range(4)]
    for counts in epochs:
        assert sum(counts.values()) == len(mixture)
        assert all(counts[f"once/{index}"] == 1 for index in range(12))
        assert sorted(counts[f"more/{index}"] for index in range(12)) == [2] * 9 + [3] * 3
        assert not any(name.startswith("never") for name in counts)
    assert all((epochs[0] + epochs[1])[f"half/{index}"] == 1 for index in range(12)), "the other half comes next"
    assert all(sum(counts[f"more/{index}"] for counts in epochs) == 9 for index in range(12))
    assert np.array_equal(mixture.epoch(1, seed=4), mixture.epoch(1, seed=4))
    assert not np.array_equal(mixture.epoch(0, seed=4), mixture.epoch(0, seed=5))


def test_a_source_that_gives_an_epoch_nothing_is_refused(filled: Any, processor: AnchorFormerProcessor) -> None:
    sources = {"tiny": {**filled.write(), "weight": 0.01}, "whole": filled.write()}
    with pytest.raises(UserError, match="holds no sample of tiny") as caught:
        Mixture(filled.config(sources=sources), processor)
    assert "tiny: weight 0.01 of 12" in caught.value.found


@pytest.mark.parametrize(("change", "expected"), [
    ({"root": "/no/such/folder"}, "data.root"),
    ({"sources": {"own": {**LLAVA, "annotations": "x", "weight": -1}}}, "weight=-1"),
    ({"sources": {"own": {**LLAVA, "annotations": "x", "weight": float("nan")}}}, "weight=nan"),
    ({"sources": {"own": {**LLAVA, "annotations": "x", "weight": 0}}}, "nothing"),
    ({"sources": {"own": {**LLAVA, "annotation": "x"}}}, "do not fit"),
    ({"sources": {"own": {"_target_": "os.path.join"}}}, "does not name"),
])  # fmt: skip
def test_config_mistakes(corpus: Any, processor: AnchorFormerProcessor, change: dict[str, Any], expected: str) -> None:
    corpus.add(1)
    with pytest.raises(UserError, match=expected):
        Mixture(corpus.config(**change), processor)
