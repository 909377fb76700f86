"""Labels are provably right: what is supervised decodes to the answers and their stops, whatever was said before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from anchorformer.contracts import IGNORE_INDEX
from anchorformer.images import ImageTransform
from anchorformer.processing import AnchorFormerProcessor

FAMILIES = ("bytes", "legacy_false", "legacy_true")
TEMPLATES = ("plain", "v1", "chat")
T = 3
PIXEL = Image.new("RGB", (2, 2))

ONE = [("user", "What is it?"), ("assistant", "It is red.")]
THREE = [*ONE, ("user", "And the shop?"), ("assistant", "the name is café 42"), ("user", "7?"), ("assistant", "7.50")]
DIALOGUES = {
    "1 turn": ONE,
    "3 turns": THREE,
    "system": [("system", "Be brief."), *ONE],
    "image first": [("user", "<image>\nWhat is it?"), *ONE[1:]],
    "image middle": [("user", "What <image> is it?"), *THREE[1:]],
    "image last": [("user", "What is it?\n<image>"), *THREE[1:]],
    "image alone": [("user", "<image>"), *ONE[1:]],
    "image in second turn": [*ONE, ("user", "and <image>?"), ("assistant", "blue")],
    "two images in a turn": [("user", "<image> or <image>\n?"), *ONE[1:]],
    "images in two turns": [("user", "<image>\nthis"), *ONE[1:], ("user", "that <image>"), ("assistant", "blue")],
    "empty answer": [("user", "Say nothing"), ("assistant", "")],
    "empty answer first": [("user", "<image>\nSay nothing"), ("assistant", ""), *THREE],
    "empty answer between": [*ONE, ("user", "Say nothing"), ("assistant", ""), *ONE],
    "answer repeated in prompt": [("user", "It is red. It is red.\nIs it? It is red."), *ONE[1:], *ONE],
    "answer is a prompt": [("user", "USER: ASSISTANT: x"), ("assistant", "USER: y ASSISTANT: z")],
    "special tokens in text": [("user", "what is </s> or <s>?"), ("assistant", "part one</s>part two"), *ONE],
    "spaces around": [("user", " q "), ("assistant", "  two spaces first "), ("user", "q"), ("assistant", "\nline\n")],
    "marker in a text-only record": [("user", "The token <image> is text here"), ("assistant", "Yes: <image>.")],
    "marker in an answer": [("user", "<image>\nHow is it written?"), ("assistant", "As <image>, I think.")],
}
Make = Callable[[str, str], AnchorFormerProcessor]


@pytest.fixture(scope="module")
def make_processor(make_tokenizer: Callable[..., Any]) -> Make:
    made = {
        family: AnchorFormerProcessor(ImageTransform(4, (0, 0, 0)), make_tokenizer(family), num_image_tokens=T)
        for family in FAMILIES
    }
    return lambda family, template: made[family].with_template(template)


def images_of(turns: list[tuple[str, str]], name: str = "") -> int:
    return 0 if "text-only" in name else sum(text.count("<image>") for role, text in turns if role == "user")


def spans_of(labels: list[int]) -> list[list[int]]:
    spans: list[list[int]] = []
    for before, label in zip([IGNORE_INDEX, *labels], labels, strict=False):
        if label != IGNORE_INDEX:
            if before == IGNORE_INDEX:
                spans.append([])
            spans[-1].append(label)
    return spans


def sentence_piece_text(processor: AnchorFormerProcessor, span: list[int]) -> str:
    """By SentencePiece's rules alone: special tokens as written, the rest decoded from pieces."""
    special = {index: token for token, index in processor.encoder.specials.items()}
    pieces = b""
    for index in span:
        piece = special.get(index) or processor.encoder._plain.id_to_piece(index).replace("▁", " ")
        is_byte = piece.startswith("<0x") and index not in special
        pieces += bytes([int(piece[3:5], 16)]) if is_byte else piece.encode()
    return pieces.decode()


def check(processor: AnchorFormerProcessor, turns: list[tuple[str, str]], num_images: int) -> None:
    example = processor.encode(turns, [PIXEL] * num_images, sample_id="s")
    ids, labels = example.input_ids_S.tolist(), example.labels_S.tolist()
    answers = [text for role, text in turns if role == "assistant"]
    sentencepiece = processor.encoder.__class__.__name__ == "SentencePieceEncoder"

    # Exactly the answers and their stops.
    spans = spans_of(labels)
    if processor.template == "plain":  # two answers without an image between them touch
        spans = [[label for span in spans for label in span]]
        expected = ["".join(f"{answer}\n" for answer in answers)]
    elif processor.template == "v1":
        expected = [f" {answer}</s>" if answer else "</s>" for answer in answers]
    else:
        expected = [f"{answer}</s>" for answer in answers]
    if sentencepiece:
        seen = [sentence_piece_text(processor, span) for span in spans]
        if processor.template == "plain":  # each call of the tokenizer begins with its dummy prefix
            seen = [text.removeprefix(" ") for text in seen]
            fresh = [f"{answer}\n" for answer in answers]
            if num_images:
                seen, expected = [seen[0].replace("\n ", "\n")], ["".join(fresh).replace("\n ", "\n")]
        if processor.encoder.legacy:
            # `legacy: true` puts a prefix after every special token, so also after one inside an answer.
            seen = [text.replace("</s> part", "</s>part") for text in seen]
    else:
        seen = [processor.tokenizer.decode(span, clean_up_tokenization_spaces=False) for span in spans]
    assert seen == expected

    # Labels are the ids themselves; image tokens are never among them.
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    assert processor.image_token_id not in labels
    assert ids.count(processor.image_token_id) == T * num_images
    assert example.tiles_B3HW.shape == (num_images, 3, 4, 4)

    # One BOS, in front; the last target is the stop.
    literal = sum(text.count("<s>") for _, text in turns) if processor.template != "plain" else 0
    assert ids[0] == processor.tokenizer.bos_token_id
    assert ids.count(processor.tokenizer.bos_token_id) == 1 + literal
    assert labels[-1] in processor.stop_token_ids or processor.template == "plain"

    # What is asked in evaluation is what was trained on, to the token.
    prompt = processor.prompt(turns[:-1], [PIXEL] * num_images).tolist()
    assert ids[: len(prompt)] == prompt
    if processor.template != "plain":
        assert ids[len(prompt) :] == spans[-1]
    assert labels[len(prompt) :] == ids[len(prompt) :]

    assert processor.measure(turns, num_images) == (len(ids), sum(map(len, spans)))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_dialogue(make_processor: Make, family: str, template: str, subtests: pytest.Subtests) -> None:
    processor = make_processor(family, template)
    for name, turns in DIALOGUES.items():
        with subtests.test(name):
            check(processor, turns, images_of(turns, name))


LINES = st.text(st.sampled_from("abcdeRSU :.,7é猫\n\"'(<>|/"), max_size=12)
QUESTIONS = st.lists(LINES, min_size=1, max_size=3).map("<image>".join)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pairs=st.lists(st.tuples(QUESTIONS, LINES), min_size=1, max_size=3))
@pytest.mark.parametrize("template", ["v1", "chat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_dialogue(make_processor: Make, family: str, template: str, pairs: list[tuple[str, str]]) -> None:
    turns = [turn for asked, said in pairs for turn in (("user", asked), ("assistant", said))]
    check(make_processor(family, template), turns, images_of(turns))


@pytest.mark.parametrize("template", TEMPLATES)
def test_assistant_who_speaks_first_is_not_heard(make_processor: Make, template: str) -> None:
    processor = make_processor("bytes", template)
    with_greeting = processor.encode([("assistant", "Hello!"), *ONE], [], sample_id="s")
    without = processor.encode(ONE, [], sample_id="s")
    assert with_greeting.input_ids_S.equal(without.input_ids_S)
    assert with_greeting.labels_S.equal(without.labels_S)


@pytest.mark.parametrize("template", ["v1", "chat"])
def test_turn_without_answer_is_kept_unsupervised(make_processor: Make, template: str) -> None:
    processor = make_processor("bytes", template)
    ends = processor.encode([*ONE, ("user", "and then?")], [], sample_id="s")
    whole = processor.encode(ONE, [], sample_id="s")
    length = len(whole.input_ids_S)
    assert ends.input_ids_S[:length].equal(whole.input_ids_S)
    assert ends.labels_S[:length].equal(whole.labels_S)
    assert len(ends.input_ids_S) > length
    assert (ends.labels_S[length:] == IGNORE_INDEX).all()
    assert "and then?" in processor.tokenizer.decode(ends.input_ids_S[length:])


def test_sample_without_targets_is_measured_as_such(make_processor: Make) -> None:
    for template in TEMPLATES:
        assert make_processor("bytes", template).measure([("user", "anybody?")], 0).num_supervised == 0
