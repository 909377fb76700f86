"""What each template writes, and which tokenizers and chat templates are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from anchorformer.dialogue import read_turns
from anchorformer.errors import UserError
from anchorformer.images import ImageTransform
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.templates import V1_SYSTEM, Picture, Segment, Special, Text

Make = Callable[..., Any]
TURNS = [("user", "What?"), ("assistant", "Red."), ("user", "Sure?"), ("assistant", "Yes.")]

# Chat templates as they are found in the wild, reduced to the trait that matters here.
GEN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TRIMS = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}" + GEN
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_BOS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}" + GEN
WITHOUT_PROMPT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
WITHOUT_STOP = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}<|assistant|>{% endif %}{% endfor %}"
FORGETS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}"
    "{{ eos_token }}{% endfor %}" + GEN
)
THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}{{ eos_token }}{% endfor %}" + GEN
)
REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}" + GEN
)


def chat(make_tokenizer: Make, template: str | None, family: str = "bytes") -> AnchorFormerProcessor:
    tokenizer = make_tokenizer(family, chat_template=template)
    return AnchorFormerProcessor(ImageTransform(4, (0, 0, 0)), tokenizer, num_image_tokens=2, template="chat")


def written(processor: AnchorFormerProcessor, turns: list[tuple[str, str]], num_images: int = 0) -> list[Segment]:
    return processor._template.segments(read_turns(turns, num_images, "s"), generate=False)


def flat(segments: list[Segment]) -> str:
    """A dialogue as one string: images as @, special tokens as their id in angle brackets, targets in brackets."""
    parts = []
    for segment in segments:
        match segment:
            case Picture():
                parts.append("@")
            case Special(index, supervised):
                parts.append(f"[<{index}>]" if supervised else f"<{index}>")
            case Text(text, _, supervised):
                parts.append(f"[{text}]" if supervised else text)
    return "".join(parts)


@pytest.fixture(scope="module")
def v1(make_tokenizer: Make) -> AnchorFormerProcessor:
    return AnchorFormerProcessor(ImageTransform(4, (0, 0, 0)), make_tokenizer("bytes"), num_image_tokens=2)


def test_v1(v1: AnchorFormerProcessor) -> None:
    expected = f"<1>{V1_SYSTEM} USER: What? ASSISTANT:[ Red.][<2>]USER: Sure? ASSISTANT:[ Yes.][<2>]"
    assert flat(written(v1, TURNS)) == expected
    assert flat(written(v1, [("system", "Be brief."), *TURNS[:2]])).startswith("<1>Be brief. USER: What? ")


@pytest.mark.parametrize(
    ("said", "images", "expected"),
    [
        ("<image>\nWhat?", 1, "@\nWhat?"),
        ("What?\n<image>", 1, "@\nWhat?"),
        ("Look at <image> now ", 1, "@\nLook at  now"),
        ("<image>", 1, "@"),
        ("<image> or <image>?", 2, "@\n@\nor ?"),
        ("<image><image>", 2, "@\n@"),
        (" a <image> b", 0, " a <image> b"),
    ],
)
def test_v1_moves_images_to_the_front_of_their_turn(
    v1: AnchorFormerProcessor, said: str, images: int, expected: str
) -> None:
    text = flat(written(v1, [("user", said), ("assistant", "x")], images))
    assert text == f"<1>{V1_SYSTEM} USER: {expected} ASSISTANT:[ x][<2>]"


def test_plain(v1: AnchorFormerProcessor) -> None:
    plain = v1.with_template("plain")
    assert flat(written(plain, [("user", "Render <image>!"), ("assistant", "a cat")], 1)) == "<1>@[a cat\n]"
    assert flat(written(plain, TURNS)) == "<1>[Red.\n][Yes.\n]"
    assert v1.template == "v1", "another template does not change the processor it came from"


def test_chat_leaves_images_where_they_stand(make_tokenizer: Make) -> None:
    turns = [("user", "a <image> b<image>"), ("assistant", "c")]
    assert flat(written(chat(make_tokenizer, TRIMS), turns, 2)) == "<s><|user|>a @ b@</s><|assistant|>[c</s>]"


@pytest.mark.parametrize(
    ("template", "expected", "stop"),
    [
        (TRIMS, "<s><|user|>q</s><|assistant|>[a</s>]<|user|>r</s><|assistant|>[b</s>]", "</s>"),
        (BRACKETS, "<s>[INST] q [/INST][  a  </s>][INST] r [/INST][ b </s>]", " </s>"),
        (NO_BOS, "<|user|>q</s>\n<|assistant|>[ a </s>]\n<|user|>r</s>\n<|assistant|>[b</s>]", "</s>"),
    ],
    ids=["trims", "brackets", "no_bos"],
)
@pytest.mark.parametrize("family", ["bytes", "legacy_false", "legacy_true"])
def test_chat_supervises_what_the_template_writes_for_an_answer(
    make_tokenizer: Make, template: str, expected: str, stop: str, family: str
) -> None:
    processor = chat(make_tokenizer, template, family)
    turns = [("user", "q"), ("assistant", " a "), ("user", "r"), ("assistant", "b")]
    assert flat(written(processor, turns)) == expected
    assert processor.stop == stop
    ids = processor.encode(turns, [], sample_id="s").input_ids_S.tolist()
    assert ids[-1] == processor.tokenizer.eos_token_id
    assert ids.count(processor.tokenizer.bos_token_id) == ("<s>" in expected)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "without a chat template"),
        (WITHOUT_PROMPT, "directly after the generation prompt"),
        (WITHOUT_STOP, "does not end an answer"),
        (FORGETS, "rewrites earlier turns"),
        (THINKS, "directly after the generation prompt"),
    ],
    ids=["none", "without_prompt", "without_stop", "forgets", "thinks"],
)
def test_unusable_chat_templates_are_refused_before_any_data_is_read(
    make_tokenizer: Make, template: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        chat(make_tokenizer, template)


def test_chat_template_that_refuses_a_record(make_tokenizer: Make) -> None:
    processor = chat(make_tokenizer, REFUSES_SYSTEM)
    with pytest.raises(UserError, match="no system role"):
        written(processor, [("system", "s"), *TURNS])


def test_chat_template_that_asks_for_the_day(make_tokenizer: Make) -> None:
    today = "{% if date_string is not defined %}{{ raise_exception('it would ask the clock') }}{% endif %}"
    assert "26 Jul 2024" in flat(written(chat(make_tokenizer, today + "{{ date_string }}" + NO_BOS), TURNS))


@pytest.mark.parametrize("missing", ["bos_token", "eos_token"])
def test_v1_needs_bos_and_eos(make_tokenizer: Make, missing: str) -> None:
    tokenizer = make_tokenizer("bytes", **{missing: None})
    with pytest.raises(UserError, match="v1 does not fit this tokenizer"):
        AnchorFormerProcessor(ImageTransform(4, (0, 0, 0)), tokenizer, template="v1")


def test_unknown_template(v1: AnchorFormerProcessor) -> None:
    with pytest.raises(UserError, match="vicuna"):
        v1.with_template("vicuna")


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [("assistant", "alone")],
        [("user", "a"), ("user", "b")],
        [("user", "a"), ("assistant", "b"), ("assistant", "c")],
        [("user", "a"), ("system", "b")],
        [("human", "a"), ("gpt", "b")],
    ],
)
def test_turns_that_do_not_alternate(turns: list[tuple[str, str]]) -> None:
    with pytest.raises(UserError, match="shop/7"):
        read_turns(turns, 0, "shop/7")


@pytest.mark.parametrize(("text", "images"), [("<image>", 2), ("<image><image>", 1), ("none", 1)])
def test_placeholders_that_do_not_match(text: str, images: int) -> None:
    with pytest.raises(UserError) as error:
        read_turns([("user", text), ("assistant", "<image>")], images, "shop/7")
    assert f"{text.count('<image>')} <image>" in error.value.found
    assert f"{images} image(s)" in error.value.found
