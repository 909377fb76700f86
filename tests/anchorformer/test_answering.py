"""Answers as they come: whole characters, no special tokens, errors told, nothing read twice; and transformers' own."""

from __future__ import annotations

import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import TextIteratorStreamer

from anchorformer.answering import Answer
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.seen import Seen
from anchorformer.weights import load_model

RED = Image.new("RGB", (40, 40), (255, 0, 0))
TURNS = [("user", "<image>\nwhat color is the star?")]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> AnchorFormerForConditionalGeneration:
    return load_model(tiny_folder, torch.float32).eval()


@pytest.fixture(scope="module")
def processor(tiny_folder: Path) -> AnchorFormerProcessor:
    return AnchorFormerProcessor.from_pretrained(tiny_folder)


def says(monkeypatch: pytest.MonkeyPatch, model: Any, ids: list[int]) -> None:
    """Makes `generate` say these tokens."""

    def generate(input_ids: torch.Tensor, streamer: Any, **_: Any) -> torch.Tensor:
        streamer.put(input_ids)
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([input_ids, torch.tensor([ids])], dim=1)

    monkeypatch.setattr(model, "generate", generate)


@pytest.mark.parametrize("said", ["", "red", " a star, 3 of 4", "café über 4 € 😀 日本", "line\n\n two "])
def test_pieces_are_whole_characters(
    monkeypatch: pytest.MonkeyPatch, model: Any, processor: AnchorFormerProcessor, said: str
) -> None:
    tokens = processor.tokenizer.encode(said, add_special_tokens=False)
    says(monkeypatch, model, [*tokens, processor.tokenizer.eos_token_id])
    answer = Answer(model, processor, TURNS, [RED])
    pieces = list(answer)
    assert "".join(pieces) == answer.text == said.lstrip()
    assert all(pieces)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(pieces) > 1 or len(said) < 4


def test_a_character_that_is_cut_off_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, model: Any, processor: AnchorFormerProcessor
) -> None:
    tokens = processor.tokenizer.encode("red 😀", add_special_tokens=False)
    assert "\N{REPLACEMENT CHARACTER}" in processor.tokenizer.decode(tokens[:-1])
    says(monkeypatch, model, tokens[:-1])
    assert "".join(Answer(model, processor, TURNS, [RED])) == "red "


def answers(model: Any, processor: AnchorFormerProcessor, turns: Any, images: Any) -> str:
    return "".join(Answer(model, processor, turns, images, max_new_tokens=8))


def test_an_answer_is_what_generate_says(model: Any, processor: AnchorFormerProcessor) -> None:
    inputs = processor([RED], conversations=[TURNS])
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=processor.stop_token_ids)
    said = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers(model, processor, TURNS, [RED]) == said.lstrip().rstrip("\N{REPLACEMENT CHARACTER}")


def test_a_conversation_is_read_on(model: Any, processor: AnchorFormerProcessor) -> None:
    longer = [*TURNS, ("assistant", "red"), ("user", "how many objects are there?")]
    expected = [answers(model, processor, turns, [RED]) for turns in (TURNS, longer)]
    read: list[int] = []
    hook = model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    seen = Seen(model, processor, [RED])
    assert [answers(model, processor, turns, seen) for turns in (TURNS, longer)] == expected
    hook.remove()
    first, second = (len(processor.prompt(turns, [RED])) for turns in (TURNS, longer))
    begun = [length for length in read if length > 1]  # else one token after another
    assert begun == [first, pytest.approx(second - first, abs=1)]


def test_leaving_early_stops_it(model: Any, processor: AnchorFormerProcessor) -> None:
    seen, before = Seen(model, processor, [RED]), threading.active_count()
    pieces = iter(Answer(model, processor, TURNS, seen, max_new_tokens=200))
    next(pieces)
    assert isinstance(pieces, Generator)
    pieces.close()
    assert threading.active_count() == before
    assert answers(model, processor, TURNS, seen) == answers(model, processor, TURNS, [RED])


def test_what_generation_raises_is_raised_to_the_reader(
    monkeypatch: pytest.MonkeyPatch, model: Any, processor: AnchorFormerProcessor
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="planted"):
        list(Answer(model, processor, TURNS, [RED]))


def test_streamer_of_transformers(model: Any, processor: AnchorFormerProcessor) -> None:
    inputs = processor([RED], conversations=[TURNS])
    settings = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": processor.stop_token_ids}
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    worker = threading.Thread(target=model.generate, kwargs={**inputs, **settings, "streamer": streamer})
    worker.start()
    streamed = "".join(streamer)
    worker.join()
    ids = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    assert streamed == processor.tokenizer.decode(ids, skip_special_tokens=True)
