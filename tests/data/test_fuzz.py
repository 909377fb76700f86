"""Anything at all as a record, a conversation or an image: declared errors only, and supervised text to the letter."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from anchorformer.contracts import IGNORE_INDEX
from anchorformer.errors import UserError
from anchorformer.images import ImageTransform, open_image
from anchorformer.processing import AnchorFormerProcessor
from data.annotations import AnnotationFile, RecordError, read_entries
from data.arrow import SCHEMA, _row, _understood
from data.collate import collate, make_filler
from data.encoder import turns_of
from data.examine import examine_image, examine_record
from data.record import ImageRef
from data.sources import chartqa, docvqa, gqa, llava, mm_vet, pope, scienceqa, textvqa, vizwiz, vqa, vqav2
from tests.spoilt import encoded

T = TypeVar("T")


def tried(call: Callable[[], T]) -> T | RecordError | UserError:
    """What a call returns, or the declared error that it raises; any other one fails the test."""
    try:
        return call()
    except (RecordError, UserError) as error:
        return error


PARSERS = {
    "llava": llava._parse,
    "vqa": vqa.VqaConfig(annotations="x")._parse,
    "docvqa": docvqa.DocvqaConfig(split="val")._parse,
    "textvqa": textvqa.TextvqaConfig(split="val")._parse,
    "vqav2": vqav2.Vqav2Config(split="val2014")._parse,
    "gqa": gqa.GqaConfig(split="val")._parse,
    "pope": pope._Parser("random", ""),
    "scienceqa": scienceqa.ScienceqaConfig(split="test")._parse,
    "vizwiz": vizwiz.VizwizConfig(split="val")._parse,
    "mm_vet": mm_vet.MmVetConfig()._parse,
    "chartqa": lambda raw, position: chartqa.ChartqaConfig(split="val")._parse(chartqa.Kind.human, raw, position),
}
KEYS = ("id", "image", "conversations", "system_prompt", "from", "value", "question_id", "questionId", "question",
        "answer", "answers", "question_types", "kind", "imgname", "query", "label", "image_id", "imageId", "annotation",
        "multiple_choice_answer", "text", "choices", "hint", "split", "subject", "imagename")  # fmt: skip

# JSON can hold halves of surrogate pairs, and UTF-8 cannot.
ANY_TEXT = st.text(max_size=8) | st.sampled_from(["\ud83d", "a\udc00b", "<image>", "\0", "</s>"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
    | st.sampled_from(["<image>", "human", "gpt", "a.png", "../a", "/etc/passwd", "a\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
SPOKEN = st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": ANY_TEXT}),
                  min_size=1, max_size=4)  # fmt: skip
PATHS = st.sampled_from(["a.png", "a/b.jpg", "\udc00.png", "a/../../b", "/etc/passwd"])
# Right for every format at once, or as good as.
SOUND = st.fixed_dictionaries({
    **dict.fromkeys(("id", "question_id", "questionId"), ANY_TEXT | st.integers()),
    **dict.fromkeys(("question", "query", "answer", "label"), ANY_TEXT), "answers": st.lists(ANY_TEXT, max_size=2),
    **dict.fromkeys(("image", "imgname"), PATHS), "conversations": SPOKEN,
})  # fmt: skip
JUNK = st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=2)
ENTRIES = SOUND | ANYTHING | st.tuples(SOUND, JUNK).map(lambda both: both[0] | both[1])


@pytest.mark.parametrize("form", sorted(PARSERS))
@given(raw=ENTRIES)
@settings(deadline=None)
def test_an_entry_is_a_record_or_has_a_reason(processor: AnchorFormerProcessor, form: str, raw: Any) -> None:
    record = tried(lambda: _understood(AnnotationFile(Path("x.json"), PARSERS[form]), raw, 0))
    if isinstance(record, Exception):
        assert isinstance(record, RecordError)
        assert str(record)
        return
    row = _row(record, {}) | {"malformed": None}
    pa.RecordBatch.from_pydict({name: [value] for name, value in row.items()}, schema=SCHEMA)
    assert all(".." not in image.path.parts and not image.path.is_absolute() for image in record.images if image.path)
    examine_record(record)
    measured = tried(lambda: processor.measure(turns_of(record), len(record.images)))
    assert isinstance(measured, UserError) or 0 <= measured.num_supervised <= measured.length


@given(
    entries=st.lists(ENTRIES, max_size=3), cut=st.integers(0, 60), at=st.integers(0, 200), byte=st.binary(max_size=3)
)
@settings(deadline=None)
def test_a_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Any], cut: int, at: int, byte: bytes
) -> None:
    content = json.dumps(entries).encode()
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_bytes(content)
    assert json.dumps(list(read_entries(path))) == json.dumps(entries)
    path.write_bytes((content[:at] + byte + content[at:])[: len(content) + len(byte) - cut])
    read = tried(lambda: list(read_entries(path)))
    assert isinstance(read, list) or str(path) in str(read)


TEXT = st.text(max_size=12) | st.sampled_from(
    ["</s>", " <s>a", "<image>", "a\r\n", "\0", "é\u0301 \U0001f600", "▁", " "]
)
EXCHANGES = st.lists(st.tuples(TEXT, st.integers(0, 2), TEXT), min_size=1, max_size=3)


def _turns(exchanges: Sequence[tuple[str, int, str]]) -> tuple[list[tuple[str, str]], int]:
    """A conversation over as many images as it has placeholders."""
    turns = []
    for asked, images, answer in exchanges:
        turns += [("user", "<image>" * images + asked.replace("<image>", "")), ("assistant", answer)]
    return turns, sum(images for _, images, _ in exchanges)


def _trained_text(template: str, exchanges: Sequence[tuple[str, int, str]]) -> str:
    """What has to be supervised, and nothing else."""
    before, stop = (" ", "</s>") if template == "v1" else ("", "\n" if template == "plain" else "</s>")
    return "".join((before if answer else "") + answer + stop for _, _, answer in exchanges)


@pytest.mark.parametrize("template", ["plain", "v1", "chat"])
@given(samples=st.lists(EXCHANGES, min_size=1, max_size=3))
@settings(deadline=None)
def test_supervised_text_is_exact(
    processor: AnchorFormerProcessor, template: str, samples: list[list[tuple[str, int, str]]]
) -> None:
    writer = processor.with_template(template)
    examples = []
    for number, exchanges in enumerate(samples):
        turns, images = _turns(exchanges)
        pictures = [Image.new("RGB", (3, 5))] * images
        example = writer.encode(turns, pictures, sample_id=f"s{number}")
        supervised = example.labels_S[example.labels_S != IGNORE_INDEX].tolist()
        assert writer.tokenizer.decode(supervised) == _trained_text(template, exchanges)
        assert int((example.input_ids_S == writer.image_token_id).sum()) == images * writer.num_image_tokens
        assert writer.measure(turns, images) == (example.input_ids_S.numel(), len(supervised))
        examples.append(example)
    batch = collate(examples, make_filler(writer))
    wanted = "".join(_trained_text(template, exchanges) for exchanges in samples)
    assert writer.tokenizer.decode(batch.targets_Q.tolist()) == wanted
    # A target is the next id of its own sample, never the first one of another.
    assert batch.input_ids_S[batch.predict_index_Q + 1].tolist() == batch.targets_Q.tolist()
    ends = batch.cu_seqlens[1:] - 1
    assert not set(ends.tolist()) & set(batch.predict_index_Q.tolist())


ROLES = st.sampled_from(["user", "assistant", "system", "tool", ""])


@given(turns=st.lists(st.tuples(ROLES, TEXT), max_size=5), images=st.integers(0, 3),
       limit=st.none() | st.integers(1, 40), rule=st.sampled_from(["error", "drop", "truncate_answer"]))  # fmt: skip
@settings(deadline=None)
def test_a_conversation_is_encoded_or_refused(
    processor: AnchorFormerProcessor, turns: list[tuple[str, str]], images: int, limit: int | None, rule: str
) -> None:
    pictures = [Image.new("L", (2, 2))] * images
    example = tried(lambda: processor.encode(turns, pictures, sample_id="s", max_length=limit, overlength=rule))
    if isinstance(example, Exception):
        assert str(example).startswith(("s: ", "the chat template"))
        return
    assert limit is None or example.input_ids_S.numel() <= limit
    assert example.tiles_B3HW.shape[0] == images


PICTURES = [
    *(encoded("PNG", mode, (9, 7)) for mode in ("RGB", "RGBA", "P", "L", "LA", "1", "I;16")),
    *(encoded("JPEG", mode, (9, 7)) for mode in ("RGB", "L", "CMYK")),
    *(encoded("TIFF", mode, (9, 7)) for mode in ("RGB", "F", "I;16", "CMYK")),
    encoded("GIF", "P", (9, 7)), encoded("WEBP", "RGB", (9, 7)), encoded("BMP", "RGB", (9, 7)),
    encoded("PPM", "RGB", (9, 7)), b"",
]  # fmt: skip


@given(content=st.sampled_from(PICTURES), changes=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4),
       st.integers(0, 8)), max_size=4))  # fmt: skip
@settings(deadline=None)
def test_bytes_are_an_image_or_not(content: bytes, changes: list[tuple[float, bytes, int]]) -> None:
    for share, put, taken in changes:
        at = int(share * len(content))
        content = content[:at] + put + content[at + taken :]
    findings, _ = examine_image(ImageRef(data=content))
    image = tried(lambda: open_image(content))
    assert any(finding.defect.is_bad for finding in findings) == isinstance(image, UserError), "scan and training agree"
    if isinstance(image, Image.Image):
        assert ImageTransform(14, (1, 2, 3))(image).shape == (3, 14, 14)


@given(mode=st.sampled_from(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F",
                             "I;16"]), width=st.integers(1, 300), height=st.integers(1, 300))  # fmt: skip
@settings(deadline=None)
def test_every_shape_and_mode_has_a_tile(mode: str, width: int, height: int) -> None:
    assume(width * height < 20_000)
    assert ImageTransform(14, (1, 2, 3))(Image.new(mode, (width, height))).shape == (3, 14, 14)
