"""Every source on a fixture of a few records, its real files where they are, and files that are not as published."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anchorformer.errors import UserError
from anchorformer.schema import parse_plugin
from data.arrow import _row
from data.record import Record, Role
from data.sources.base import PACKAGE, SourceConfig

Write = Callable[[str, Any], Path]

LLAVA = {"_target_": "data.sources.llava.LlavaConfig", "annotations": "mix.json", "images": "images"}
DOCVQA = {"_target_": "data.sources.docvqa.DocvqaConfig", "split": "val"}
CHARTQA = {"_target_": "data.sources.chartqa.ChartqaConfig", "split": "train"}
VQA = {"_target_": "data.sources.vqa.VqaConfig", "annotations": "val.json"}

CONVERSATION = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]


def _open(spec: dict[str, Any], root: Path, cache: Path) -> Any:
    return parse_plugin(SourceConfig, spec, PACKAGE, "data.sources.x").open("x", root, cache)


def _records(source: Any) -> list[Record]:
    return [source[index] for index in range(len(source))]


def test_llava(tmp_path: Path, write_json: Write) -> None:
    (tmp_path / "images").mkdir()
    write_json(
        "mix.json",
        [
            {"id": 7, "image": "coco/a.jpg", "conversations": CONVERSATION},
            {"id": "7", "image": ["a.jpg", "b.jpg"], "system_prompt": "Be short.", "conversations": CONVERSATION},
            {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": ""}]},
        ],
    )
    first, second, third = _records(_open(LLAVA, tmp_path, tmp_path / "cache"))
    assert first.images[0].path == tmp_path / "images/coco/a.jpg"
    assert [(turn.role, turn.text) for turn in first.turns] == [
        (Role.user, "<image>\nwhat?"),
        (Role.assistant, "this"),
    ]
    assert (first.id, second.id, third.id) == ("7", "7~2", "#2")
    assert second.meta == (("duplicate_of", "7"),)
    assert [turn.role for turn in second.turns] == [Role.system, Role.user, Role.assistant]
    assert len(second.images) == 2
    assert third.images == ()


def test_repeated_ids_stay_apart(tmp_path: Path, write_json: Write) -> None:
    (tmp_path / "images").mkdir()
    given = ["a", "a", "a~2", "a~4", "a", "a", "a~2"]
    write_json("mix.json", [{"id": name, "conversations": CONVERSATION} for name in given])
    records = _records(_open(LLAVA, tmp_path, tmp_path / "cache"))
    assert [record.id for record in records] == ["a", "a~2", "a~2~2", "a~4", "a~3", "a~5", "a~2~3"]
    assert [dict(record.meta).get("duplicate_of") for record in records] == [None, "a", "a~2", None, "a", "a", "a~2"]


def test_repeats_cost_the_same_each() -> None:
    class Counting(dict[str, int]):
        asked = 0

        def __contains__(self, key: object) -> bool:
            self.asked += 1
            return super().__contains__(key)

    taken = Counting()
    rows = [_row(Record("same", (), ()), taken)["id"] for _ in range(1000)]
    assert len(set(rows)) == 1000
    assert taken.asked <= 2 * 1000


def test_docvqa(tmp_path: Path, write_json: Write) -> None:
    entry = {"questionId": 3, "question": "who?", "image": "documents/a.png", "answers": ["Ann", "ann"]}
    without = {"questionId": 4, "question": "when?", "image": "documents/a.png"}
    content = {"dataset_name": "x", "data": [entry, {**entry, "question_types": ["form", "list"]}, without]}
    write_json("docvqa/val_v1.0_withQT.json", content)
    first, second, third = _records(_open(DOCVQA, tmp_path, tmp_path / "cache"))
    assert first.turns[0].text == "<image>\nwho?\nAnswer the question using a single word or phrase."
    assert first.turns[1].text == "Ann"
    assert first.references == ("Ann", "ann")
    assert ("question_types", "form|list") in second.meta
    assert [turn.role for turn in third.turns] == [Role.user], "a split without answers has nothing to train on"
    write_json("docvqa/val_v1.0.json", content)
    with pytest.raises(UserError, match="there twice"):
        _open(DOCVQA, tmp_path, tmp_path / "cache")
    named = {**DOCVQA, "annotations": "val_v1.0.json", "prompt_suffix": ""}
    assert _open(named, tmp_path, tmp_path / "cache")[0].turns[0].text == "<image>\nwho?"


@pytest.mark.parametrize("folder", ["chartqa", "chartqa/ChartQA Dataset"])
def test_chartqa(tmp_path: Path, write_json: Write, folder: str) -> None:
    (tmp_path / folder / "train/png").mkdir(parents=True)
    write_json(
        f"{folder}/train/train_human.json",
        [
            {"imgname": "a.png", "query": "how many?", "label": 3},
            {"imgname": "a.png", "query": "which?", "label": "[Austria, Chile]"},
        ],
    )
    write_json(f"{folder}/train/train_augmented.json", [{"imgname": "b.png", "query": "how much?", "label": "0.5"}])
    source = _open(CHARTQA, tmp_path, tmp_path / "cache")
    records = _records(source)
    assert [record.turns[1].text for record in records] == ["3", "[Austria, Chile]", "0.5"]
    assert [dict(record.meta)["kind"] for record in records] == ["human", "human", "augmented"]
    assert records[0].turns[0].text == "<image>\nhow many?\nAnswer the question with a single word."
    assert records[2].images[0].path == tmp_path / folder / "train/png/b.png"
    assert [source.record_id(index) for index in range(3)] == [record.id for record in records]
    only = _open({**CHARTQA, "kinds": ["augmented"]}, tmp_path, tmp_path / "cache")
    assert [record.turns[1].text for record in _records(only)] == ["0.5"]
    assert only.fingerprint != source.fingerprint


def test_vqa(tmp_path: Path, write_json: Write) -> None:
    entry = {"question_id": "q", "image": "a.png", "question": "where?", "answer": "left"}
    write_json("val.json", [entry, {**entry, "answer": ["left", "Left"]}, {"image": "a.png", "question": "why?"}])
    first, second, third = _records(_open(VQA, tmp_path, tmp_path / "cache"))
    assert first.turns[0].text == "<image>\nwhere?"
    assert second.references == ("left", "Left")
    assert len(third.turns) == 1


def test_records_are_found_in_any_batch_and_any_process(tmp_path: Path, write_json: Write) -> None:
    (tmp_path / "images").mkdir()
    write_json("mix.json", [{"id": index, "conversations": CONVERSATION} for index in range(2500)])
    source = _open(LLAVA, tmp_path, tmp_path / "cache")
    assert len(source) == 2500
    copy = pickle.loads(pickle.dumps(source))
    for index in (0, 1023, 1024, 2047, 2048, 2499):
        assert source[index].id == copy[index].id == copy.record_id(index) == str(index)
    with pytest.raises(IndexError):
        source[2500]


def test_cache_follows_content_and_options(tmp_path: Path, write_json: Write) -> None:
    (tmp_path / "images").mkdir()
    write_json("mix.json", [{"id": 1, "conversations": CONVERSATION}])
    cache = tmp_path / "cache"
    first = _open(LLAVA, tmp_path, cache)
    made = next(cache.glob("*.arrow"))
    stamp = made.stat().st_mtime_ns
    again = _open({**LLAVA, "weight": 0.5}, tmp_path, cache)
    assert again.fingerprint == first.fingerprint, "a weight changes no record"
    assert made.stat().st_mtime_ns == stamp, "nothing is converted twice"
    write_json("mix.json", [{"id": 2, "conversations": CONVERSATION}])
    changed = _open(LLAVA, tmp_path, cache)
    assert changed.fingerprint != first.fingerprint
    assert changed[0].id == "2"


@pytest.mark.parametrize(("record", "expected"), [
    ({"id": 5, "image": "../secret.png", "conversations": CONVERSATION}, "leaves the image root"),
    ({"id": 5, "image": "/etc/passwd", "conversations": CONVERSATION}, "leaves the image root"),
    ({"id": 5, "image": "a/../../b.png", "conversations": CONVERSATION}, "leaves the image root"),
    ({"id": 5, "image": 3, "conversations": CONVERSATION}, "not a file name"),
    ({"id": 5, "image": "", "conversations": CONVERSATION}, "not a file name"),
    ({"id": 5}, "not a list of turns"),
    ({"id": 5, "conversations": []}, "not a list of turns"),
    ({"id": 5, "conversations": [{"from": "robot", "value": "x"}]}, "'from' is none of"),
    ({"id": 5, "conversations": [{"from": "human"}]}, "'value' is missing"),
    ({"id": 5, "conversations": ["hello"]}, "'from' is none of"),
    ("hello", "not an object"),
])  # fmt: skip
def test_a_record_that_cannot_be_used_is_named(tmp_path: Path, write_json: Write, record: Any, expected: str) -> None:
    (tmp_path / "images").mkdir()
    file = write_json("mix.json", [{"id": 1, "conversations": CONVERSATION}, record])
    with pytest.raises(UserError, match="record 1") as caught:
        _open(LLAVA, tmp_path, tmp_path / "cache").check_records()
    assert str(file) in caught.value.what
    assert expected in caught.value.found
    assert isinstance(record, str) or "(id 5)" in caught.value.what


@pytest.mark.parametrize(("text", "expected"), [
    (json.dumps([{"id": "äö", "conversations": CONVERSATION}] * 2)[:-30], "at byte"),
    ("[]garbage", "after the end"),
    (json.dumps([{"conversations": CONVERSATION}] * 2).replace("}, {\"conv", "} {\"conv"), "no ',' or ']'"),
    ('{"data": [], }', "at byte"),
    ("", "at byte 0 of 0"),
])  # fmt: skip
def test_damaged_json_names_file_and_byte(tmp_path: Path, write_json: Write, text: str, expected: str) -> None:
    (tmp_path / "images").mkdir()
    file = write_json("mix.json", text)
    with pytest.raises(UserError) as caught:
        _open({**LLAVA, "images": "."}, tmp_path, tmp_path / "cache")
    assert str(file) in caught.value.what
    assert expected in caught.value.found


def test_truncated_file_reports_the_byte_where_it_breaks_off(tmp_path: Path, write_json: Write) -> None:
    (tmp_path / "images").mkdir()
    whole = json.dumps([{"id": "ä", "conversations": CONVERSATION}], ensure_ascii=False).encode()
    file = tmp_path / "mix.json"
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError) as caught:
        _open(LLAVA, tmp_path, tmp_path / "cache")
    assert f"at byte {len(whole) - 1} of {len(whole) - 1}" in caught.value.found
    file.write_bytes(whole[:9] + b"\xff" + whole[9:])
    with pytest.raises(UserError, match="not UTF-8"):
        _open(LLAVA, tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(("spec", "present", "expected"), [
    (LLAVA, [], "annotation file is missing"),
    (LLAVA, ["mix.json"], "image folder is missing"),
    (DOCVQA, ["docvqa/other.json"], "annotation file is missing"),
    (CHARTQA, ["chartqa/train/train_human.json"], "annotation file is missing"),
    (VQA, ["val.json"], "no records"),
])  # fmt: skip
def test_a_folder_without_the_expected_layout(
    tmp_path: Path, write_json: Write, spec: dict[str, Any], present: list[str], expected: str
) -> None:
    for name in present:
        write_json(name, [])
    with pytest.raises(UserError) as caught:
        _open(spec, tmp_path, tmp_path / "cache")
    assert expected in caught.value.what
    assert caught.value.found
    assert "data.sources.x" in caught.value.what


def test_object_without_data_list(tmp_path: Path, write_json: Write) -> None:
    (tmp_path / "images").mkdir()
    write_json("mix.json", {"annotations": []})
    with pytest.raises(UserError, match="not a list of records") as caught:
        _open(LLAVA, tmp_path, tmp_path / "cache")
    assert "annotations" in caught.value.found


@pytest.mark.slow
def test_reading_records_does_not_fill_memory(tmp_path: Path, write_json: Write) -> None:
    # A Python list of these records takes some 80 MB; mapped pages are shared and do not count as anonymous.
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc on this system")

    def anonymous() -> int:
        return int(re.search(r"RssAnon:\s+(\d+)", status.read_text()).group(1)) // 1024  # type: ignore[union-attr]

    (tmp_path / "images").mkdir()
    long = [{"from": "human", "value": "why " * 50}, {"from": "gpt", "value": "so " * 200}]
    write_json("mix.json", [{"id": index, "conversations": long} for index in range(60_000)])
    _open(LLAVA, tmp_path, tmp_path / "cache")
    source = _open(LLAVA, tmp_path, tmp_path / "cache")
    for index in range(2000):
        source[index]
    before = anonymous()
    for index in range(len(source)):
        source[index]
    assert anonymous() - before < 20, "MB more after an epoch"


def _native_files(root: Path) -> list[tuple[dict[str, Any], Path, int]]:
    """Every file of the real data with the source that reads it and the number of its records, read from the file."""
    found = []
    for path in sorted(root.rglob("*.json")):
        content = json.loads(path.read_text())
        entries = content["data"] if isinstance(content, dict) else content
        relative = path.relative_to(root).as_posix()
        spec: dict[str, Any] = {}
        if isinstance(content, dict):
            spec = {"_target_": DOCVQA["_target_"], "split": content["dataset_split"], "annotations": path.name,
                    "folder": path.parent.relative_to(root).as_posix()}  # fmt: skip
        elif entries and "conversations" in entries[0]:
            spec = {"_target_": LLAVA["_target_"], "annotations": relative, "images": "."}
        elif entries and "imgname" in entries[0]:
            split, kind = path.stem.split("_")
            spec = {"_target_": CHARTQA["_target_"], "split": split, "kinds": [kind],
                    "folder": path.parent.parent.relative_to(root).as_posix()}  # fmt: skip
        if spec:
            found.append((spec, path, len(entries)))
    return found


def test_real_files_give_every_record(realdata_root: Path, tmp_path: Path) -> None:
    files = _native_files(realdata_root)
    assert files
    for spec, path, count in files:
        source = _open(spec, realdata_root, tmp_path)
        assert len(source) == count, path
        ids = {source[index].id for index in range(count)}
        assert len(ids) == count, f"{path}: ids are unique"
