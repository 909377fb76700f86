"""transformers' own doors: messages as it writes them, and its pipeline, which answers as `generate` does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, pipeline

import anchorformer.auto  # noqa: F401  (makes the model known to transformers)
from anchorformer.errors import UserError
from anchorformer.images import ImageTransform
from anchorformer.model_folder import derive_folder
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.weights import check_folder
from tests.conftest import Assemble

Make = Callable[..., Any]
RED, BLUE = Image.new("RGB", (40, 40), (255, 0, 0)), Image.new("RGB", (30, 60), (0, 0, 255))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 30, 3), dtype=np.uint8))


def image(source: Any, name: str = "image") -> dict[str, Any]:
    return {"type": "image", name: source}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


ASKED = [user(image(RED), text("what color is the star?"))]
TALK = [
    {"role": "system", "content": "be brief"}, user(image(RED), image(BLUE), text("which is red?")),
    {"role": "assistant", "content": [text("the first")]}, user(text("and"), image(NOISE)),
]  # fmt: skip
TALK_TURNS = [
    ("system", "be brief"), ("user", "<image>\n<image>\nwhich is red?"), ("assistant", "the first"),
    ("user", "and\n<image>"),
]  # fmt: skip


@pytest.fixture(scope="module", params=["v1", "chat", "plain"])
def processor(request: pytest.FixtureRequest, make_tokenizer: Make) -> AnchorFormerProcessor:
    return AnchorFormerProcessor(
        ImageTransform(4, (1, 2, 3)), make_tokenizer("legacy_false"), num_image_tokens=5, template=request.param
    )


@pytest.mark.parametrize(
    ("messages", "turns", "images"),
    [
        (ASKED, [("user", "<image>\nwhat color is the star?")], [RED]),
        (TALK, TALK_TURNS, [RED, BLUE, NOISE]),
        ([{"role": "user", "content": "hello"}], [("user", "hello")], []),
    ],
)
def test_messages_are_conversations(
    processor: AnchorFormerProcessor, messages: Any, turns: Any, images: list[Image.Image]
) -> None:
    found = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    expected = processor([images], conversations=[turns])
    assert isinstance(found, dict | type(expected))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert torch.equal(ids, expected["input_ids"])


def test_a_batch_of_messages(processor: AnchorFormerProcessor) -> None:
    found = processor.apply_chat_template([ASKED, TALK], add_generation_prompt=True, tokenize=True, return_dict=True)
    turns = [[("user", "<image>\nwhat color is the star?")], TALK_TURNS]
    expected = processor([RED, RED, BLUE, NOISE], conversations=turns)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["bytes", "legacy_false", "legacy_true"])
@pytest.mark.parametrize("template", ["v1", "chat", "plain"])
def test_the_text_of_a_question_has_its_ids(make_tokenizer: Make, family: str, template: str) -> None:
    processor = AnchorFormerProcessor(
        ImageTransform(4, (1, 2, 3)), make_tokenizer(family), num_image_tokens=5, template=template
    )
    for messages, images in ((ASKED, [RED]), ([user(text("hello"))], [])):
        written = processor.apply_chat_template(messages, add_generation_prompt=True)
        ids = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        assert torch.equal(processor(text=written, images=images)["input_ids"], ids), written
    told = [*ASKED, {"role": "assistant", "content": "red"}]
    assert processor.apply_chat_template(told).rstrip().endswith("red" + processor.stop.strip())
    first, second = processor.apply_chat_template([ASKED, TALK], add_generation_prompt=True)
    assert (first.count("<image>"), second.count("<image>")) == (1, 3)


def test_images_of_this_machine_only(processor: AnchorFormerProcessor, tmp_path: Path) -> None:
    NOISE.save(tmp_path / "noise.png")
    (tmp_path / "broken.png").write_bytes(b"no image")

    def read(item: dict[str, Any]) -> Any:
        return processor.apply_chat_template(
            [user(item, text("what?"))], add_generation_prompt=True, tokenize=True, return_dict=True
        )

    expected = read(image(NOISE))["pixel_values"]
    for source in (tmp_path / "noise.png", str(tmp_path / "noise.png")):
        for name in ("image", "path", "url"):
            assert torch.equal(read(image(source, name))["pixel_values"], expected)
    for address in (
        "https://example.com/a.png",
        "http://localhost/a.png",
        "file:///etc/hosts",
        "data:image/png;base64,A",
    ):
        with pytest.raises(UserError, match="images are not fetched"):
            read(image(address, "url"))
    for wrong in ("broken.png", "missing.png"):
        with pytest.raises(UserError, match=wrong):
            read(image(tmp_path / wrong))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user"}],
        [{"content": "hello"}],
        ["hello"],
        [user({"type": "video", "video": "a.mp4"})],
        [user({"type": "image"})],
        [user(image(b"bytes"))],
        [user(text("hello")), {"role": "assistant", "content": [image(RED)]}, user(text("and?"))],
        [user(text("a <image> that is not there"))],
        [{"role": "tool", "content": "12"}],
        [*ASKED, {"role": "assistant", "content": "red"}],
        [],
    ],
)
def test_messages_that_make_no_sense(processor: AnchorFormerProcessor, messages: Any) -> None:
    with pytest.raises(UserError):
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"tools": [{"name": "f"}]}, {"chat_template": "{{ messages }}"}, {"continue_final_message": True},
        {"return_tensors": "np"}, {"add_generation_prompt": False}, {"processor_kwargs": {"size": 3}},
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused(processor: AnchorFormerProcessor, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="does not write conversations in this way"):
        processor.apply_chat_template(ASKED, **{"add_generation_prompt": True, "tokenize": True, **arguments})


@pytest.mark.parametrize("tiling", [None, {"grids": [[1, 2], [2, 1]]}])
def test_the_pipeline_answers_as_generate_does(assemble_tiny: Assemble, tiling: Any) -> None:
    pipe = pipeline("image-text-to-text", model=str(assemble_tiny(tiling=tiling)), dtype=torch.float32, device="cpu")
    model, processor = pipe.model, pipe.processor
    assert isinstance(processor, AnchorFormerProcessor)
    settings = {"max_new_tokens": 6, "do_sample": False}
    chats = [ASKED, TALK, [user(text("hello"))]]
    found = pipe(text=chats, generate_kwargs=settings, return_full_text=False)
    for messages, (answer,) in zip(chats, found, strict=True):
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        ids = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        expected = processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert answer["generated_text"] == expected
    full = pipe(text=ASKED, generate_kwargs=settings)[0]["generated_text"]
    assert full[:-1] == ASKED
    assert full[-1]["role"] == "assistant"
    with pytest.raises(UserError, match="continue_final_message"):
        pipe(text=[*ASKED, {"role": "assistant", "content": [text("it is")]}])


def test_generation_ends_where_the_template_ends_an_answer(assemble_tiny: Assemble, tmp_path: Path) -> None:
    """Also for those who know nothing of templates, and after a stage with another one."""
    start = assemble_tiny(template="plain")
    processor = AnchorFormerProcessor.from_pretrained(start)
    newline = processor.stop_token_ids[0]
    assert processor.tokenizer.decode([newline]) == "\n"
    assert GenerationConfig.from_pretrained(start).eos_token_id == [newline, processor.tokenizer.eos_token_id]
    done = derive_folder(start, {}, tmp_path / "done", processor.with_template("chat"))
    before, after = (GenerationConfig.from_pretrained(folder).to_dict() for folder in (start, done))
    assert after.pop("eos_token_id") == [processor.tokenizer.eos_token_id] != before.pop("eos_token_id")
    assert after == before
    check_folder(done)


def test_the_examples_of_the_page_run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_folder)
    for name in ("a.png", "b.png", "c.png"):
        NOISE.save(name)
    names: dict[str, Any] = {"image": NOISE, "questions": ["what?", "how many?"]}
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        exec(example, names)
    assert names["ids"].ndim == 1  # of the last answer about the image that was seen
