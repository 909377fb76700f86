"""Ids and labels against the published preprocessing, for both settings of the Llama tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from anchorformer.contracts import IGNORE_INDEX
from anchorformer.dialogue import PLACEHOLDER
from anchorformer.errors import UserError
from anchorformer.images import ImageTransform
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.templates import V1_SYSTEM
from anchorformer.tokenization import After

IMAGE_SLOT = -200  # what the published code puts where an image goes; one placeholder here (num_image_tokens=1)
ROLES = {"human": "user", "gpt": "assistant"}
SPECIALS = ("<s>", "</s>", "<unk>")

Record = dict[str, Any]


def turns_of(record: Record) -> list[tuple[str, str]]:
    return [(ROLES[turn["from"]], turn["value"]) for turn in record["conversations"]]


def heard(record: Record) -> list[tuple[str, str]]:
    turns = turns_of(record)
    return turns[1:] if turns[0][0] == "assistant" else turns


def answers(record: Record) -> list[str]:
    return [text for role, text in heard(record) if role == "assistant"]


def num_placeholders(record: Record) -> int:
    """Images that the published code splices in: none without an image key, whatever the text says."""
    return sum(text.count(PLACEHOLDER) for role, text in heard(record) if role == "user") if "image" in record else 0


# Where ours is not the published result, by rule. These change the labels only ...
LABEL_RULES: dict[str, Callable[[Record], bool]] = {
    "conversation ends with the human: the published code mutes the sample": lambda r: heard(r)[-1][0] == "user",
    "literal special token in a turn: the published code mutes the sample": lambda r: any(
        token in text for _, text in heard(r) for token in SPECIALS
    ),
    "role marker in a turn: the published code mutes the sample": lambda r: any(
        "ASSISTANT: " in text for _, text in heard(r)
    ),
}
# ... and these the ids as well.
ID_RULES: dict[str, Callable[[Record], bool]] = {
    "empty answer: the published code writes neither stop nor label": lambda r: "" in answers(r),
    "several placeholders in one turn: the published code merges them": lambda r: any(
        text.count(PLACEHOLDER) > 1 for role, text in heard(r) if role == "user" and "image" in r
    ),
}


@pytest.fixture(scope="module", params=["false", "true"], ids=["legacy_false", "legacy_true"])
def published(request: pytest.FixtureRequest, golden_root: Path) -> tuple[dict[str, Any], AnchorFormerProcessor]:
    folder = golden_root / "text"
    tokenizer = AutoTokenizer.from_pretrained(folder / f"tokenizer_legacy_{request.param}")
    expected = json.loads((folder / f"expected_legacy_{request.param}.json").read_text("utf-8"))
    return expected, AnchorFormerProcessor(ImageTransform(8, (0, 0, 0)), tokenizer, num_image_tokens=1)


def written_v1(record: Record) -> str:
    """The v1 conversation as one string with our rules, built apart from the template: the check of its segments."""
    text, turns = V1_SYSTEM, heard(record)
    for index, (role, said) in enumerate(turns):
        if role == "user":
            images = said.count(PLACEHOLDER) if num_placeholders(record) else 0
            if images:
                said = f"{PLACEHOLDER}\n" * images + said.replace(PLACEHOLDER, "").strip()
            text += f" USER: {said}" if index == 0 else f"USER: {said}"
            text += " ASSISTANT:" if index + 1 < len(turns) else " "
        else:
            text += f"{' ' + said if said else ''}</s>"
    return text


def encode_whole(processor: AnchorFormerProcessor, text: str, *, images: bool) -> list[int]:
    ids = [processor.tokenizer.bos_token_id]
    for index, chunk in enumerate(text.split(PLACEHOLDER) if images else [text]):
        ids += [processor.image_token_id] * (index > 0) + processor.encoder.encode(chunk, After.nothing)
    return ids


def check_ours(processor: AnchorFormerProcessor, record: Record, ids: list[int], labels: list[int]) -> None:
    """What holds for every v1 record: the text is that of the whole conversation, and all answers are supervised."""
    assert ids == encode_whole(processor, written_v1(record), images=num_placeholders(record) > 0)
    spans: list[list[int]] = []
    for before, label in zip([IGNORE_INDEX, *labels], labels, strict=False):
        if label != IGNORE_INDEX:
            if before == IGNORE_INDEX:
                spans.append([])
            spans[-1].append(label)
    tokenizer = processor.tokenizer
    # The decoder writes the prefix space that `legacy: true` puts after a special token; it is not in the text.
    seen = [tokenizer.decode(span).replace("</s> ", "</s>") for span in spans]
    assert seen == [f"{answer}</s>".replace("</s> ", "</s>") for answer in answers(record)]


@pytest.mark.parametrize("template", ["plain", "v1"])
def test_records(
    published: tuple[dict[str, Any], AnchorFormerProcessor], golden_root: Path, template: str,
    subtests: pytest.Subtests,
) -> None:  # fmt: skip
    expected, processor = published[0], published[1].with_template(template)
    records = {r["id"]: r for r in json.loads((golden_root / f"text/records_{template}.json").read_text("utf-8"))}
    lists = {
        int(name.removeprefix(f"{template}_max")): cases
        for name, cases in expected.items()
        if name.startswith(f"{template}_max") and isinstance(cases, list)
    }
    assert lists
    for limit, cases in lists.items():
        assert {case["id"] for case in cases} == set(records)
        for case in cases:
            with subtests.test(f"max{limit} {case['id']}"):
                compare(processor, records[case["id"]], case, limit)


def compare(processor: AnchorFormerProcessor, record: Record, case: dict[str, Any], limit: int) -> None:
    num_images = num_placeholders(record)
    ids, labels = processor._writer.labelled(turns_of(record), [1] * num_images, record["id"])
    measured = processor.measure(turns_of(record), num_images)
    assert measured == (len(ids), sum(label != IGNORE_INDEX for label in labels))
    slots = [IMAGE_SLOT if token == processor.image_token_id else token for token in ids]
    v1 = processor.template == "v1"
    if v1:
        check_ours(processor, record, ids, labels)
    if v1 and any(rule(record) for rule in ID_RULES.values()):
        assert slots != case["input_ids"]  # a rule without an effect would not be a deviation
        return
    too_long = len(ids) > limit
    # Over-length: the published code cuts (text when it tokenises, image samples when it collates); ours raises.
    assert case["input_ids"] == (slots[: case["length"]] if too_long else slots)
    if too_long:
        images = [Image.new("RGB", (8, 8))] * num_images
        with pytest.raises(UserError, match=f"{record['id']}.*too long"):
            processor.encode(turns_of(record), images, sample_id=record["id"], max_length=limit)
    elif v1 and any(rule(record) for rule in LABEL_RULES.values()):
        assert case["supervised"] == 0
        assert sum(label != IGNORE_INDEX for label in labels) > 0
    else:
        assert case["labels"] == labels
    if "image" in record and not num_images:
        # The published code keeps the image and splices it nowhere; a model that saw it would not know where.
        with pytest.raises(UserError, match="placeholders and images"):
            processor.measure(turns_of(record), 1)


def test_every_rule_has_a_record(golden_root: Path) -> None:
    """A rule that no record exercises would be a hole that nobody looks through."""
    records = json.loads((golden_root / "text/records_v1.json").read_text("utf-8"))
    for name, rule in {**LABEL_RULES, **ID_RULES}.items():
        assert any(rule(record) for record in records), name


def test_raw_calls(published: tuple[dict[str, Any], AnchorFormerProcessor]) -> None:
    expected, processor = published
    for case in expected["raw_tokenizer_calls"]:
        bos = processor.tokenizer.bos_token_id
        assert [bos, *processor.encoder.encode(case["text"], After.nothing)] == case["input_ids"], case["text"]


def test_inference_prompts(published: tuple[dict[str, Any], AnchorFormerProcessor]) -> None:
    """A prompt that is already written out is encoded as it stands; the template writes the same one wherever the
    question is written as in training (the published inference code does not strip a question, its training does)."""
    expected, processor = published
    for case in expected["inference_prompts"]:
        count = case["question"].count(PLACEHOLDER)
        images = [Image.new("RGB", (8, 8))] * count or None
        ids = processor(text=case["prompt"], images=images)["input_ids"][0].tolist()
        assert [IMAGE_SLOT if token == processor.image_token_id else token for token in ids] == case["input_ids"]
        said = case["question"].replace(PLACEHOLDER, "")
        if not count or said == f"\n{said.strip()}":
            assert processor.prompt([("user", case["question"])], images or []).tolist() == ids


def test_word_lengths(golden_root: Path) -> None:
    if any(golden_root.glob("text/lengths_*.json")):
        pytest.skip("lengths in words group samples in the published loader; ours deals by counted tokens")
