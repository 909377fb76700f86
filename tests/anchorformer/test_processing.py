"""The processor's other doors: length rules, the padded form, saving and loading, and literal image tokens."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from anchorformer.contracts import IGNORE_INDEX
from anchorformer.errors import UserError
from anchorformer.images import ImageTransform
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.tokenization import After, FastEncoder, SentencePieceEncoder

Make = Callable[..., Any]
FAMILIES = ("bytes", "legacy_false", "legacy_true")
T = 5
RED, BLUE = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 2), (0, 0, 255))
TURNS = [
    ("user", "<image>\nWhat is the total?"), ("assistant", "It is red, I think."), ("user", "And?"),
    ("assistant", " the name of the shop"),
]  # fmt: skip


def build(make_tokenizer: Make, family: str = "bytes", **changes: Any) -> AnchorFormerProcessor:
    values = {"num_image_tokens": T, **changes}
    return AnchorFormerProcessor(ImageTransform(4, (1, 2, 3)), make_tokenizer(family), **values)


@pytest.fixture(scope="module")
def processor(make_tokenizer: Make) -> AnchorFormerProcessor:
    return build(make_tokenizer)


@pytest.mark.parametrize("overlength", ["error", "drop"])
def test_too_long_is_an_error_with_both_counts(processor: AnchorFormerProcessor, overlength: str) -> None:
    length, supervised = processor.measure(TURNS, 1)
    kept = processor.encode(TURNS, [RED], sample_id="shop/7", max_length=length, overlength=overlength)
    assert kept.input_ids_S.numel() == length
    with pytest.raises(UserError) as error:
        processor.encode(TURNS, [RED], sample_id="shop/7", max_length=length - 1, overlength=overlength)
    assert "shop/7" in error.value.what
    assert f"{length} positions ({T} of them image tokens, {supervised} supervised)" in error.value.found
    assert str(length - 1) in error.value.expected


def test_truncation_keeps_every_anchor_and_a_target(processor: AnchorFormerProcessor) -> None:
    turns = [*TURNS, ("user", "this <image>?"), ("assistant", "7.50 and 42 percent")]
    whole = processor.encode(turns, [RED, BLUE], sample_id="s")
    length = whole.input_ids_S.numel()
    last_anchor = int((whole.input_ids_S == processor.image_token_id).nonzero().max())
    outcomes = set()
    for limit in range(1, length + 2):
        rule = {"max_length": limit, "overlength": "truncate_answer"}
        measured = processor.measure(turns, 2, **rule)
        outcomes.add(measured.length <= limit)
        if limit <= last_anchor:
            assert measured.length == length, "cannot be cut: planning sees its full length"
            with pytest.raises(UserError, match="every image token and at least one target"):
                processor.encode(turns, [RED, BLUE], sample_id="s", **rule)
            continue
        example = processor.encode(turns, [RED, BLUE], sample_id="s", **rule)
        assert measured == (min(limit, length), int((example.labels_S != IGNORE_INDEX).sum()))
        assert example.input_ids_S.equal(whole.input_ids_S[:limit])
        assert example.labels_S.equal(whole.labels_S[:limit])
        assert example.tiles_B3HW.equal(whole.tiles_B3HW)
        assert measured.num_supervised > 0
    assert outcomes == {True, False}


def test_truncation_needs_a_target(processor: AnchorFormerProcessor) -> None:
    turns = [("user", "What is the total? " * 9), ("assistant", "red")]
    prompt = processor.prompt(turns[:1], []).numel()
    assert processor.measure(turns, 0, max_length=prompt, overlength="truncate_answer").length > prompt
    assert processor.measure(turns, 0, max_length=prompt + 1, overlength="truncate_answer") == (prompt + 1, 1)


def test_unknown_overlength_rule(processor: AnchorFormerProcessor) -> None:
    with pytest.raises(UserError, match="truncate_answers"):
        processor.measure(TURNS, 1, max_length=3, overlength="truncate_answers")


def test_anchor_count_is_counted(make_tokenizer: Make) -> None:
    lengths = [build(make_tokenizer, num_image_tokens=count).measure(TURNS, 1).length for count in (1, 65, 145)]
    assert [length - lengths[0] for length in lengths] == [0, 64, 144]


@pytest.mark.parametrize("family", [*FAMILIES, "bytes_with_image"])
def test_image_token_in_text_is_text(make_tokenizer: Make, family: str) -> None:
    """Only placeholders become images, although the tokenizer knows the token by the same name."""
    processor = build(make_tokenizer, family)
    assert processor.tokenizer.encode("<image>", add_special_tokens=False) == [processor.image_token_id]
    turns = [("user", "the token <image> is text"), ("assistant", "<image>")]
    example = processor.encode(turns, [], sample_id="s")
    assert processor.image_token_id not in example.input_ids_S
    assert "<image>" in processor.tokenizer.decode(example.input_ids_S)


@pytest.mark.parametrize("family", ["bytes", "bytes_with_image"])
def test_image_token_leaves_other_ids_alone(make_tokenizer: Make, family: str) -> None:
    tokenizer = make_tokenizer(family)
    tokenizer.add_tokens(["<image>", "<after>"], special_tokens=True)
    processor = AnchorFormerProcessor(ImageTransform(4, (0, 0, 0)), tokenizer, num_image_tokens=1)
    text = "</s>a<|user|>red<after>" + "".join(map(chr, range(32, 127)))
    assert processor.encoder.encode(text, After.nothing) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("template", ["plain", "v1", "chat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(make_tokenizer: Make, tmp_path: Path, family: str, template: str) -> None:
    before = build(make_tokenizer, family, template=template)
    before.save_pretrained(tmp_path)
    after = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(after, AnchorFormerProcessor)
    assert after.to_dict() == before.to_dict()
    assert type(after.encoder) is type(before.encoder)
    turns = [("user", " <image> a</s> b"), ("assistant", "  c</s> d"), ("user", "e"), ("assistant", "f")]
    for processor in (after, pickle.loads(pickle.dumps(after))):
        example, expected = (each.encode(turns, [BLUE], sample_id="s") for each in (processor, before))
        assert example.input_ids_S.equal(expected.input_ids_S)
        assert example.labels_S.equal(expected.labels_S)
        assert example.tiles_B3HW.equal(expected.tiles_B3HW)
    # What a loaded one writes is stable: length tables are named by its hash. (The first tokenizer_config.json lacks
    # what transformers only knows of a tokenizer that came from a folder.)
    after.save_pretrained(tmp_path / "second")
    AutoProcessor.from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "third")
    second, third = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("second", "third")
    )
    assert second == third
    assert set(second) == {path.name for path in tmp_path.iterdir() if path.is_file()}


def test_sentencepiece_is_chosen_where_there_is_one(make_tokenizer: Make, sentencepiece_folder: Path) -> None:
    assert isinstance(build(make_tokenizer, "bytes").encoder, FastEncoder)
    for family in ("legacy_true", "legacy_false"):
        encoder = build(make_tokenizer, family).encoder
        assert isinstance(encoder, SentencePieceEncoder)
        assert encoder.legacy is (family == "legacy_true")
    tokenizer = AutoTokenizer.from_pretrained(sentencepiece_folder)
    fast = FastEncoder(tokenizer, {"<s>": 1, "</s>": 2, "<unk>": 0}, "<image>")
    slow = build(make_tokenizer, "legacy_false").encoder
    for text in ("a red square", "x y", "é 42", "a</s>red square"):  # none of these begins with a space
        for after in After:
            assert fast.encode(text, after) == slow.encode(text, after), (text, after)
    assert fast.encode(" red", After.text) == slow.encode(" red", After.text)


def test_leading_space_survives_a_normaliser_that_strips(stripping_sentencepiece: bytes) -> None:
    encoder = pickle.loads(pickle.dumps(SentencePieceEncoder(stripping_sentencepiece, {"</s>": 2}, legacy=False)))
    assert encoder.encode(" red", After.text) == encoder.encode("red", After.nothing)
    assert encoder.encode(" red", After.text) != encoder.encode("red", After.text)


@pytest.mark.parametrize("family", ["bytes", "legacy_false"])
def test_chat_is_what_the_tokenizer_makes_of_the_rendered_text(make_tokenizer: Make, family: str) -> None:
    """Across an image too: it stands as one special token in the rendered text."""
    processor = build(make_tokenizer, family, template="chat", num_image_tokens=1)
    said = "look at<image>red and<image>what?"
    rendered = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True
    )
    ids = processor.prompt([("user", said)], [RED, BLUE]).tolist()
    assert ids == processor.tokenizer.encode(rendered, add_special_tokens=False)


def test_silence_about_legacy_means_true(sentencepiece_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sentencepiece_folder, tmp_path / "silent")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["legacy"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    processor = AnchorFormerProcessor(ImageTransform(4, (0, 0, 0)), AutoTokenizer.from_pretrained(folder))
    assert isinstance(processor.encoder, SentencePieceEncoder)
    assert processor.encoder.legacy


def test_model_file_of_another_tokenizer(make_tokenizer: Make, sentencepiece_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sentencepiece_folder, tmp_path / "mixed")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    names = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    state["model"]["vocab"] = {name: index for index, name in enumerate([*names[:3], *reversed(names[3:])])}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="belongs to another tokenizer"):
        AnchorFormerProcessor(ImageTransform(4, (0, 0, 0)), AutoTokenizer.from_pretrained(folder))


def test_padded_form_equals_single_prompts(processor: AnchorFormerProcessor) -> None:
    conversations = [TURNS[:1], [("user", "no image, and much longer than the other one")], TURNS[:3]]
    batch = processor(conversations=conversations, images=[RED, BLUE])
    rows = [processor.prompt(turns, images) for turns, images in zip(conversations, ([RED], [], [BLUE]), strict=True)]
    width = max(map(len, rows))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, width)
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[mask.bool()].equal(row)
        assert mask.tolist() == [0] * (width - len(row)) + [1] * len(row)
    assert batch["pixel_values"].equal(processor.image_transform.tiles([RED, BLUE]))
    nested = processor(conversations=conversations, images=[[RED], [], [BLUE]])
    assert all(nested[name].equal(batch[name]) for name in batch)
    right = processor(conversations=conversations, images=[RED, BLUE], padding_side="right")
    assert right["attention_mask"].equal(batch["attention_mask"].flip(1))


def test_padding_is_by_length_not_by_id(make_tokenizer: Make) -> None:
    """A padding token that also occurs in text (Vicuna's is unk) is masked only where it pads."""
    tokenizer = make_tokenizer("legacy_false", pad_token="<unk>")
    processor = AnchorFormerProcessor(ImageTransform(4, (0, 0, 0)), tokenizer)
    batch = processor(text=["what is <unk> doing", "x"])
    text = batch["input_ids"][0]
    assert (text == tokenizer.pad_token_id).sum() == 1
    assert batch["attention_mask"][0].all()


def test_text_that_is_already_written_out(processor: AnchorFormerProcessor) -> None:
    batch = processor(text="USER: <image>\nWhat? ASSISTANT:", images=RED)
    assert batch["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    assert (batch["input_ids"] == processor.image_token_id).sum() == T
    assert "pixel_values" not in processor(text="hello")
    assert processor(text="<s>hello")["input_ids"].equal(processor(text="hello")["input_ids"])


@pytest.mark.parametrize(
    "arguments",
    [
        {"text": "hello <image>"},
        {"conversations": [TURNS[:1]]},
        {"text": "<image>", "images": [RED, BLUE]},
        {"text": ["<image>", "x"], "images": [[RED]]},
        {"text": ["<image>"], "images": [[RED, BLUE]]},
        {"conversations": [TURNS[:1]], "images": [RED, BLUE]},
        {"conversations": [TURNS[:2]], "images": [RED]},
        {"text": "x", "conversations": [TURNS[:1]]},
        {},
        {"text": "x", "return_tensors": "np"},
    ],
)
def test_calls_that_make_no_sense(processor: AnchorFormerProcessor, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        processor(**arguments)


def test_stop_tokens(make_tokenizer: Make) -> None:
    for family in FAMILIES:
        processor = build(make_tokenizer, family)
        eos = processor.tokenizer.eos_token_id
        assert processor.stop_token_ids == [eos]
        assert processor.with_template("chat").stop_token_ids == [eos]
        newline, *rest = processor.with_template("plain").stop_token_ids
        assert processor.tokenizer.decode([newline]) == "\n"
        assert rest == [eos]


def test_examples_are_what_the_contract_says(processor: AnchorFormerProcessor) -> None:
    example = processor.encode(TURNS, [RED], sample_id="shop/7")
    assert example.sample_id == "shop/7"
    assert example.input_ids_S.dtype == example.labels_S.dtype == torch.int64
    assert example.input_ids_S.shape == example.labels_S.shape
    assert example.tiles_B3HW.dtype == torch.uint8
