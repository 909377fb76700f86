"""The same records through Hugging Face datasets: parquet with an image column, a saved dataset, columns by name."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from anchorformer.errors import UserError
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.schema import parse, parse_plugin
from data.config import DataConfig
from data.images import load
from data.mixture import Mixture
from data.sources.base import PACKAGE, SourceConfig

TARGET = {"_target_": "data.sources.huggingface.HuggingfaceConfig"}
TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]


def _picture(shade: int) -> Image.Image:
    return Image.new("RGB", (9, 8), (shade, 0, 0))


def _open(root: Path, **values: Any) -> Any:
    spec = {**TARGET, **values}
    return parse_plugin(SourceConfig, spec, PACKAGE, "data.sources.x").open("x", root, root / "cache")


def _rows(**columns: list[Any]) -> datasets.Dataset:
    pictures = [_picture(10), _picture(20), None]
    rows = datasets.Dataset.from_dict({"image": pictures, **columns})
    return rows.cast_column("image", datasets.Image())


def test_parquet_with_conversations(tmp_path: Path) -> None:
    text = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    _rows(conversations=[TURNS, TURNS, text], name=["a", "a", "b"]).to_parquet(str(tmp_path / "part-0.parquet"))
    source = _open(tmp_path, dataset=".", conversations="conversations", id="name")
    assert len(source) == 3
    assert [source.record_id(index) for index in range(3)] == [source[index].id for index in range(3)]
    assert len({source[index].id for index in range(3)}) == 3, "ids of a file repeat, ours do not"
    assert [turn.text for turn in source[0].turns] == ["<image>\nwhat?", "this"]
    assert load(source[1].images[0]).getpixel((0, 0)) == (20, 0, 0)
    assert source[2].images == ()
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    assert _open(tmp_path, dataset="part-0.parquet", conversations="conversations")[0].turns == source[0].turns


def test_saved_dataset_with_question_and_answers(tmp_path: Path, processor: AnchorFormerProcessor) -> None:
    rows = _rows(q=["one?", "two?", "three?"], a=[["1", "one"], ["2"], ["3"]])
    datasets.DatasetDict({"val": rows}).save_to_disk(str(tmp_path / "saved"))
    columns = {"question": "q", "answers": "a", "prompt_suffix": "\nBriefly."}
    source = _open(tmp_path, dataset="saved", split="val", **columns)
    assert source[0].turns[0].text == "<image>\none?\nBriefly."
    assert source[0].references == ("1", "one")
    assert source[2].turns[0].text == "three?\nBriefly.", "no image, no placeholder"
    spec = {**TARGET, "dataset": "saved", "split": "val", **columns}
    config = parse(DataConfig, {"root": str(tmp_path), "sources": {"hf": spec}, "cache_dir": str(tmp_path / "c")}, "d")
    assert len(Mixture(config, processor)) == 3


def test_plain_parquet_without_image_type(tmp_path: Path) -> None:
    # Written by other tools: a struct of bytes and path that nobody has declared to be an image, and a list of them.
    buffer = io.BytesIO()
    _picture(30).save(buffer, "PNG")
    cell = {"bytes": buffer.getvalue(), "path": None}
    chat = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "ok"}]
    rows = datasets.Dataset.from_dict({"image": [cell], "images": [[cell, cell]], "chat": [chat]})
    rows.to_parquet(str(tmp_path / "x.parquet"))
    source = _open(tmp_path, dataset=".", image="images", conversations="chat")
    assert [load(ref).getpixel((0, 0)) for ref in source[0].images] == [(30, 0, 0)] * 2
    assert len(_open(tmp_path, dataset=".", image="image", conversations="chat")[0].images) == 1


def test_fingerprint_follows_files_and_options(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    _rows(q=["1", "2", "3"], a=["1", "2", "3"]).to_parquet(str(path))
    first = _open(tmp_path, dataset=".", question="q", answers="a")
    assert _open(tmp_path, dataset=".", question="q", answers="a", weight=2).fingerprint == first.fingerprint
    assert _open(tmp_path, dataset=".", question="a", answers="q").fingerprint != first.fingerprint


def _shards(root: Path, *names: str) -> None:
    for name in names:
        path = root / "clone" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"q": [name], "a": ["yes"]}).to_parquet(str(path))


def _questions(root: Path, split: str, **values: Any) -> list[str]:
    columns = {"image": None, "question": "q", "answers": "a"}
    source = _open(root, dataset="clone", split=split, **columns, **values)
    return [source[index].turns[0].text for index in range(len(source))]


CLONE = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
         "data/validation-00000-of-00001.parquet", "data/test_dev-00000-of-00001.parquet")  # fmt: skip


@pytest.mark.parametrize(("names", "split", "expected"), [
    (CLONE, "train", CLONE[:2]),
    (CLONE, "validation", CLONE[2:3]),
    (CLONE, "val", CLONE[2:3]),
    (CLONE, "test_dev", CLONE[3:]),
    (("train/0.parquet", "test/0.parquet"), "test", ("test/0.parquet",)),
    (("my_train.parquet", "my-dev-2.parquet", "eval.parquet"), "validation", ("my-dev-2.parquet",)),
    (("constraints.parquet", "latest.parquet"), "train", ("constraints.parquet", "latest.parquet")),
])  # fmt: skip
def test_only_the_files_of_the_split(
    tmp_path: Path, names: tuple[str, ...], split: str, expected: tuple[str, ...]
) -> None:
    _shards(tmp_path, *names)
    assert _questions(tmp_path, split) == list(expected)


@pytest.mark.parametrize(("names", "found"), [
    (CLONE[2:], "test_dev (1 file(s)), validation (1 file(s))"),
    (("train_test.parquet",), "several splits: test, train"),
    (("train/0.parquet", "more.parquet"), "no split: more.parquet"),
])  # fmt: skip
def test_a_split_that_is_not_clear(tmp_path: Path, names: tuple[str, ...], found: str) -> None:
    _shards(tmp_path, *names)
    with pytest.raises(UserError) as caught:
        _questions(tmp_path, "train")
    assert found in caught.value.found


def test_subset_of_a_local_copy(tmp_path: Path) -> None:
    _shards(tmp_path, "human/train-0.parquet", "machine/train-0.parquet")
    assert _questions(tmp_path, "train", subset="human") == ["human/train-0.parquet"]
    with pytest.raises(UserError, match="cannot be opened"):
        _questions(tmp_path, "train", subset="neither")


def test_path_outside_the_root(tmp_path: Path) -> None:
    _picture(1).save(tmp_path / "secret.png")
    root = tmp_path / "root"
    root.mkdir()
    rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": "../secret.png"}], "conversations": [TURNS]})
    rows.to_parquet(str(root / "x.parquet"))
    source = _open(root, dataset=".", conversations="conversations")
    with pytest.raises(UserError, match="outside its root"):
        load(source[0].images[0])


@pytest.mark.parametrize(("values", "expected"), [
    ({"conversations": "talk"}, "column"),
    ({"conversations": "conversations", "image": "picture"}, "column"),
    ({}, "not clear"),
    ({"question": "conversations"}, "not clear"),
    ({"conversations": "conversations", "question": "a", "answers": "b"}, "not clear"),
    ({"conversations": "conversations", "dataset": "empty"}, "cannot be opened"),
    ({"conversations": "conversations", "split": "test", "dataset": "saved"}, "cannot be opened"),
])  # fmt: skip
def test_mistakes(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    rows = _rows(conversations=[TURNS] * 3)
    rows.to_parquet(str(tmp_path / "x.parquet"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=expected):
        _open(tmp_path, **{"dataset": "x.parquet", **values})


def test_a_row_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    bad = [{"from": "robot", "value": "x"}]
    _rows(conversations=[TURNS, bad, TURNS]).to_parquet(str(tmp_path / "x.parquet"))
    source = _open(tmp_path, dataset=".", conversations="conversations")
    assert source[0]
    with pytest.raises(UserError, match="row 1"):
        source[1]
