"""Changes when the files of the world change; they must stay readable as the published formats."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from miniworld.config import WorldConfig
from miniworld.world import Split, belongs_to
from miniworld.write import write_world

TINY = WorldConfig(captions=6, instruct=8, single=5, val=5, text_only=6)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_world(TINY, root)
    return root


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def tree_digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*")) if path.is_file()
    }  # fmt: skip


def test_one_config_gives_the_same_bytes_and_another_seed_others(world: Path, tmp_path: Path) -> None:
    write_world(TINY, tmp_path / "again")
    assert tree_digest(tmp_path / "again") == tree_digest(world)


def test_captions_are_in_the_558k_format(world: Path) -> None:
    for name, count in (("captions.json", TINY.captions), ("captions_val.json", TINY.val)):
        records = read(world / "llava_pretrain" / name)
        assert len(records) == 3 * count
        assert len({record["id"] for record in records}) == len(records)
        for record in records:
            human, answer = record["conversations"]
            assert (human["from"], answer["from"]) == ("human", "gpt")
            assert human["value"].count("<image>") == 1
            with Image.open(world / "llava_pretrain" / "images" / record["image"]) as image:
                assert image.size == (96, 96)


def test_conversations_are_in_the_665k_format(world: Path) -> None:
    records = read(world / "llava_instruct" / "mix.json")
    texts = [record for record in records if "image" not in record]
    assert len(records) == 3 * TINY.instruct + TINY.text_only
    assert len(texts) == TINY.text_only
    for record in records:
        said = record["conversations"]
        assert [turn["from"] for turn in said] == ["human", "gpt"] * (len(said) // 2)
        assert len(said) <= 2 * TINY.turns
        assert sum(turn["value"].count("<image>") for turn in said) == ("image" in record)
        if "image" in record:
            assert (world / "llava_instruct" / record["image"]).is_file()
    assert max(len(record["conversations"]) for record in records) > 2


def test_documents_are_in_the_docvqa_format(world: Path) -> None:
    for split, count in (("train", TINY.single), ("val", TINY.val)):
        content = read(world / "docvqa" / f"{split}_v1.0.json")
        assert content["dataset_split"] == split
        assert len(content["data"]) == TINY.questions_per_single * count
        assert len({row["questionId"] for row in content["data"]}) == len(content["data"])
        for row in content["data"]:
            assert row["question"]
            assert row["answers"]
            assert (world / "docvqa" / row["image"]).is_file()


def test_charts_are_in_the_chartqa_format(world: Path) -> None:
    for split, count in (("train", TINY.single), ("val", TINY.val)):
        folder = world / "chartqa" / "ChartQA Dataset" / split
        rows = read(folder / f"{split}_human.json") + read(folder / f"{split}_augmented.json")
        assert len(rows) == TINY.questions_per_single * count
        for row in rows:
            assert set(row) == {"imgname", "query", "label"}
            assert (folder / "png" / row["imgname"]).is_file()


def test_held_out_scenes_are_a_short_answer_file(world: Path) -> None:
    rows = read(world / "llava_instruct" / "val.json")
    assert len(rows) == TINY.questions_per_single * TINY.val
    assert len({row["question_id"] for row in rows}) == len(rows)
    for row in rows:
        assert (world / "llava_instruct" / row["image"]).is_file()
        assert row["answer"]


def test_no_held_out_picture_is_among_the_training_pictures(world: Path) -> None:
    trained = read(world / "llava_pretrain" / "captions.json")
    held_out = read(world / "llava_pretrain" / "captions_val.json")
    assert {belongs_to(record["conversations"][1]["value"]) for record in trained} == {Split.train}
    assert {belongs_to(record["conversations"][1]["value"]) for record in held_out} == {Split.val}
    pixels: dict[Split, set[str]] = {split: set() for split in Split}
    for path in world.rglob("*.png"):
        split = Split(path.name.partition("_")[0])
        pixels[split].add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert pixels[Split.train]
    assert not pixels[Split.train] & pixels[Split.val]
