"""Answers: known embeddings, prompts that are read on, batches of every connector; the same tokens as without."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from anchorformer.errors import UserError
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.seen import Seen
from anchorformer.weights import load_model
from anchorformer.writer import Turns
from tests.conftest import Assemble

CONF = Path(__file__).resolve().parents[2] / "conf"
GREEDY = {"do_sample": False, "max_new_tokens": 6}
SMALL = {
    "num_anchors": 9, "num_queries": 4, "depth": 1, "num_heads": 2, "head_dim": 8, "ff_mult": 2, "width": 16,
    "ff_width": 24, "positions": 16,
}  # fmt: skip


def picture(seed: int, size: tuple[int, int] = (20, 31)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


ONE, TWO, WIDE = picture(0), picture(1), picture(2, (40, 90))
ASKED: list[tuple[Turns, list[Image.Image]]] = [
    ([("user", "<image>\nwhat color is the star?")], [ONE]),
    ([("user", "<image> <image>\nhow many objects are there?")], [TWO, WIDE]),
    ([("user", "describe the image.")], []),
    ([("user", "the top left <image>"), ("assistant", "red"), ("user", "and tea?")], [WIDE]),
]


class Case:
    def __init__(self, folder: Path) -> None:
        self.model: AnchorFormerForConditionalGeneration = load_model(folder, torch.float32).eval()
        self.processor: AnchorFormerProcessor = AnchorFormerProcessor.from_pretrained(folder)

    def generate(self, asked: list[tuple[Turns, list[Image.Image]]], **changes: Any) -> list[list[int]]:
        inputs = self.processor([images for _, images in asked], conversations=[turns for turns, _ in asked])
        inputs |= {**GREEDY, "eos_token_id": None, **changes}
        length = inputs["input_ids"].shape[1]
        return [row[length:].tolist() for row in self.model.generate(**inputs)]

    def alone(self, asked: list[tuple[Turns, list[Image.Image]]], **changes: Any) -> list[list[int]]:
        return [answer for one in asked for answer in self.generate([one], **changes)]


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Case:
    return Case(tiny_folder)


TILING = {"grids": [[1, 2], [2, 1], [2, 2]]}


@pytest.fixture(scope="module", params=["chat", "v1", "plain", "tiles", "joint"])
def case(request: pytest.FixtureRequest, assemble_tiny: Assemble) -> Case:
    if request.param in ("tiles", "joint"):
        select = "tile" if request.param == "tiles" else "image"
        return Case(assemble_tiny(tiling={**TILING, "select": select}))
    return Case(assemble_tiny(template=request.param))


def connectors() -> dict[str, Any]:
    """Name -> plug-in mapping of each shipped YAML at the size of the tiny tower."""
    found = {}
    for path in sorted((CONF / "connector").glob("*.yaml")):
        spec = yaml.safe_load(path.read_text())
        base, *_ = spec.pop("defaults", [None])
        if base:
            spec = yaml.safe_load((CONF / "connector" / f"{base}.yaml").read_text()) | spec
        found[path.stem] = {key: SMALL.get(key, value) if value else value for key, value in spec.items()}
    return found


@pytest.mark.parametrize("connector", connectors().values(), ids=connectors())
def test_a_batch_is_answered_as_its_rows_are(assemble_tiny: Assemble, connector: dict[str, Any]) -> None:
    made = Case(assemble_tiny(connector=connector))
    together = made.generate(ASKED)
    assert together == made.alone(ASKED)
    assert len(set(map(tuple, together))) > 1


def check_known_embeddings(case: Case) -> None:
    """Several questions about the same two images, which are looked at once."""
    asked = [([("user", f"<image><image>\n{said}")], [TWO, WIDE]) for said in ("what?", "how many stars are there?")]
    inputs = case.processor([images for _, images in asked], conversations=[turns for turns, _ in asked])
    del inputs["pixel_values"]
    inputs.pop("tile_counts", None)
    embeds = Seen(case.model, case.processor, [TWO, WIDE]).image_embeds
    inputs["image_embeds"] = torch.cat([embeds, embeds])
    for settings in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        ids = case.model.generate(**inputs, **GREEDY, eos_token_id=None, **settings)
        assert ids[:, inputs["input_ids"].shape[1] :].tolist() == case.generate(asked, **settings)


def test_known_embeddings_answer_as_their_images_do(case: Case) -> None:
    check_known_embeddings(case)


def test_beams_look_once(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    look = tiny.model.encode_images
    monkeypatch.setattr(
        tiny.model, "encode_images", lambda tiles, *rest: looked.append(len(tiles)) or look(tiles, *rest)
    )
    tiny.generate(ASKED, num_beams=3)
    assert looked == [4]


def test_embeddings_that_cannot_be_meant(tiny: Case) -> None:
    inputs = tiny.processor([ONE], conversations=[ASKED[0][0]])
    embeds = Seen(tiny.model, tiny.processor, [ONE]).image_embeds
    with pytest.raises(UserError, match="pixel_values beside them"):
        tiny.model(**inputs, image_embeds=embeds)
    del inputs["pixel_values"]
    for beams in (1, 2):
        with pytest.raises(UserError, match="9 placeholders for 18 embeddings"):
            tiny.model.generate(**inputs, image_embeds=embeds.repeat(2, 1, 1), num_beams=beams)
    with pytest.raises(UserError, match="training mode"):
        load_model_in_training(tiny)(**inputs, image_embeds=embeds)


def load_model_in_training(of: Case) -> AnchorFormerForConditionalGeneration:
    return AnchorFormerForConditionalGeneration(of.model.config).train()


def test_a_tuple_where_one_is_asked_for(tiny: Case) -> None:
    inputs = tiny.processor([ONE], conversations=[ASKED[0][0]])
    with torch.no_grad():
        named = tiny.model(**inputs, labels=inputs["input_ids"])
        loss, logits, *_ = tiny.model(**inputs, labels=inputs["input_ids"], return_dict=False)
        assert torch.equal(tiny.model(**inputs, return_dict=False)[0], logits)
    assert torch.equal(loss, named.loss)
    assert torch.equal(loss, named["loss"])
    assert torch.equal(logits, named.logits)


class Watched:
    """What a case's parts have to do: tiles that the tower sees, positions that the language model reads first."""

    def __init__(self, case: Case) -> None:
        self.tiles: list[int] = []
        self.read: list[int] = []
        self._hooks = [
            case.model.vision_tower.register_forward_hook(lambda _, args, __: self.tiles.append(len(args[0]))),
            case.model.language_model.register_forward_pre_hook(
                lambda _, __, kwargs: self.read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
            ),
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def said_to(case: Case) -> list[Turns]:
    """Questions about two images: two that begin alike, one again, one that goes on, one with the images elsewhere."""
    first: Turns = [("user", "<image><image>\nwhat color is the star?")]
    return [
        first,
        [("user", "<image><image>\nhow many objects are there?")],
        first,
        [*first, ("assistant", "red"), ("user", "and the circle?")],
        [("user", "juice <image> or <image>")],
        [("user", "juice <image>, tea 11 <image>")],
    ]


def test_what_was_read_is_not_read_again(case: Case) -> None:
    seen, watched = Seen(case.model, case.processor, [TWO, WIDE]), Watched(case)
    settings = {"do_sample": False, "max_new_tokens": 5}
    found, first_reads = [], []
    for turns in said_to(case):
        watched.read.clear()
        found.append(seen.generate(turns, **settings).tolist())
        first_reads.append(watched.read[0])
    assert len(watched.tiles) == 1
    watched.close()
    for turns, answer, read in zip(said_to(case), found, first_reads, strict=True):
        (expected,) = case.generate([(turns, [TWO, WIDE])], **settings, eos_token_id=case.processor.stop_token_ids)
        assert answer == expected
        assert read <= len(case.processor.prompt(turns, [TWO, WIDE]))
    length = [len(case.processor.prompt(turns, [TWO, WIDE])) for turns in said_to(case)]
    images = len(seen.image_embeds) * case.processor.num_image_tokens
    assert first_reads[0] == length[0]
    if case.processor.template == "plain":  # ends with the images, and writes no question down
        assert first_reads[1] == case.processor.num_image_tokens
    else:
        assert first_reads[1] <= length[1] - images
        assert first_reads[3] <= length[3] - length[0] + 1


def test_without_images_too(tiny: Case) -> None:
    seen = Seen(tiny.model, tiny.processor, [])
    settings = {"do_sample": False, "max_new_tokens": 5}
    for turns in ([("user", "describe a star")], [("user", "describe a circle")]):
        (expected,) = tiny.generate([(turns, [])], **settings, eos_token_id=tiny.processor.stop_token_ids)
        assert seen.generate(turns, **settings).tolist() == expected


def test_a_failure_leaves_nothing_half_read(tiny: Case) -> None:
    seen = Seen(tiny.model, tiny.processor, [ONE])
    turns, settings = ASKED[0][0], {"do_sample": False, "max_new_tokens": 5}
    expected = seen.generate(turns, **settings)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("planted")

    hook = tiny.model.language_model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        seen.generate([("user", "<image>\nhow many stars?")], **settings)
    hook.remove()
    assert seen.generate(turns, **settings).equal(expected)


def test_questions_at_the_same_time(tiny: Case) -> None:
    asked = [[("user", f"<image>\n{said}")] for said in ("what?", "how many?", "a star", "tea")]
    settings = {"do_sample": False, "max_new_tokens": 5}
    one_by_one = Seen(tiny.model, tiny.processor, [ONE])
    expected = [one_by_one.generate(turns, **settings).tolist() for turns in asked]
    seen = Seen(tiny.model, tiny.processor, [ONE])
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda turns: seen.generate(turns, **settings).tolist(), asked)
    assert list(found) == expected


def test_other_images_than_the_turns_speak_of(tiny: Case) -> None:
    seen = Seen(tiny.model, tiny.processor, [ONE])
    for wrong in ([("user", "no image")], [("user", "<image>"), ("assistant", "red")]):
        with pytest.raises(UserError):
            seen.generate(wrong)
