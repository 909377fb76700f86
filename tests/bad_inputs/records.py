"""Mistakes in annotation files, in their records, and in conversations that are handed to the processor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
from PIL import Image

from anchorformer.schema import parse, parse_plugin
from data.admission import admit
from data.config import DataConfig
from data.scan import scan
from data.scan_config import ScanConfig
from data.sources.base import PACKAGE, SourceConfig
from data.sources.llava import LlavaConfig
from tests.bad_inputs.case import Case, World
from tests.spoilt import RECORDS, encoded, spoken

GOOD = {"id": "good", "image": "good.png", "conversations": spoken()}
LLAVA = {"_target_": "data.sources.llava.LlavaConfig", "annotations": "mix.json", "images": "images"}


def _images(world: World) -> None:
    world.write("images/good.png", encoded("PNG"))
    world.write("secret.png", encoded("PNG"))


def _data(world: World, spec: dict[str, Any] = LLAVA, **values: Any) -> DataConfig:
    fixed = {"root": str(world.folder), "cache_dir": str(world.folder / "cache"), "max_length": 400}
    return parse(DataConfig, {**fixed, "sources": {"mix": spec}, **values}, "data")


def judge(world: World, name: str) -> None:
    """Plants a record: scan finds exactly what is declared, `skip` counts it, and `error` raises.

    Raises:
        UserError: the record's, where it is bad.
    """
    raw, defect = RECORDS[name]
    _images(world)
    world.write("mix.json", [GOOD, raw])
    found = scan(ScanConfig(data=_data(world), processor="-"), world.processor)
    assert [finding.defect for _, _, finding in found.findings] == [defect] * (defect is not None)
    source = LlavaConfig(annotations="mix.json", images="images").open("mix", world.folder, world.folder / "cache")
    lenient = _data(world, on_bad_record="skip", overlength="drop")
    admission = admit(source, world.processor, "processor", lenient)
    is_left_out = defect is not None and defect.is_bad and defect.name != "imageless"
    assert (admission.num_dropped, admission.kept.tolist()) == ((1, [0]) if is_left_out else (0, [0, 1]))
    source.check_records()
    admit(source, world.processor, "processor", _data(world))


def _says(name: str) -> tuple[str, ...]:
    defect = RECORDS[name][1]
    is_refused = defect is not None and defect.name in ("malformed", "mismatch", "refused", "too_long")
    return () if not is_refused else ("record 1 (id",) if defect.name == "malformed" else ("mix/planted",)


def _refuse(spec: dict[str, Any], files: dict[str, Any], world: World) -> None:
    _images(world)
    for name, content in files.items():
        world.write(name, content)
    source = parse_plugin(SourceConfig, spec, PACKAGE, "here").open("x", world.folder, world.folder / "cache")
    source.check_records()
    for index in range(len(source)):
        source[index]


def _file(name: str, content: Any, *says: str) -> Case:
    return Case(f"annotations_{name}", partial(_refuse, LLAVA, {"mix.json": content}), says)


FILES = [
    _file("empty", b"", "at byte 0 of 0"),
    _file("blank", b"\n \n", "at byte"),
    _file("with_no_record", [], "no records"),
    _file("broken_off", json.dumps([GOOD, GOOD])[:-9], "breaks off"),
    _file("with_bytes_behind_the_end", json.dumps([GOOD]) + "]", "text after the end"),
    _file("of_one_object_per_line", f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n", "text after the end"),
    _file("without_a_comma", f"[{json.dumps(GOOD)} {json.dumps(GOOD)}]", "no ',' or ']'"),
    _file("of_another_layout", {"annotations": []}, "keys ['annotations']"),
    _file("of_one_number", "3", "int"),
    _file("in_latin_1", json.dumps([GOOD], ensure_ascii=False).replace("what", "wä").encode("latin-1"), "not UTF-8"),
    _file("in_utf_16", json.dumps([GOOD]).encode("utf-16"), "not UTF-8"),
    _file("of_an_lfs_pointer", b"version https://git-lfs.github.com/spec/v1\n", "at byte 0"),
    _file("nested_without_end", "[" * 100_000, "recursion"),
    _file("with_a_number_of_5000_digits", f'[{{"id": {"9" * 5000}}}]', "digits"),
    _file("with_single_quotes", "[{'id': 1}]", "at byte 2"),
    _file("with_a_byte_order_mark", b"\xef\xbb\xbf" + json.dumps([GOOD]).encode()),
    _file("with_the_list_under_data", {"data": [GOOD]}),
    Case("annotations_in_a_folder", partial(_refuse, LLAVA, {"mix.json/x": "[]"}), ("annotation file is missing",)),
    Case("images_in_a_file", partial(_refuse, {**LLAVA, "images": "secret.png"}, {"mix.json": [GOOD]}),
         ("image folder is missing",)),
    Case("images_nowhere", partial(_refuse, {**LLAVA, "images": "pictures"}, {"mix.json": [GOOD]}), ("pictures",)),
]  # fmt: skip

CHART = {"_target_": "data.sources.chartqa.ChartqaConfig", "split": "val", "folder": ".", "kinds": ["human"]}
DOC = {"_target_": "data.sources.docvqa.DocvqaConfig", "split": "val", "folder": "."}
VQA = {"_target_": "data.sources.vqa.VqaConfig", "annotations": "vqa.json"}
QUESTIONS = {
    "chartqa": (CHART, "val/val_human.json", {"imgname": "a.png", "query": "how many?", "label": "3"}),
    "docvqa": (DOC, "val_v1.0.json", {"questionId": 1, "question": "who?", "image": "a.png", "answers": ["Ann"]}),
    "vqa": (VQA, "vqa.json", {"question_id": 1, "question": "who?", "image": "a.png", "answer": "Ann"}),
}


def _asked(form: str, key: str, value: Any, *says: str) -> Case:
    spec, file, entry = QUESTIONS[form]
    changed = {name: item for name, item in {**entry, key: value}.items() if item is not ...}
    files = {file: [changed], "val/png/a.png": ""}
    return Case(f"{form}_{key}_{type(value).__name__}_{str(value)[:8]}", partial(_refuse, spec, files), says)


OTHER_FORMATS = [
    _asked("chartqa", "label", ["3"], "'label' is ['3']"),
    _asked("chartqa", "label", True, "'label' is True"),
    _asked("chartqa", "label", ..., "'label' is None"),
    _asked("chartqa", "query", 3, "'query' is 3"),
    _asked("chartqa", "imgname", ..., "image path is None"),
    _asked("chartqa", "imgname", "../a.png", "leaves the image root"),
    _asked("chartqa", "label", 0.5),
    _asked("docvqa", "answers", "Ann", "not a list of strings"),
    _asked("docvqa", "answers", [3], "not a list of strings"),
    _asked("docvqa", "answers", None, "not a list of strings"),
    _asked("docvqa", "question", ..., "'question' is missing"),
    _asked("docvqa", "question_types", 3, "'question_types' is 3"),
    _asked("docvqa", "questionId", [1], "neither text nor a number"),
    _asked("docvqa", "image", "/etc/passwd", "leaves the image root"),
    _asked("docvqa", "answers", ["\ud800"], "surrogate"),
    _asked("docvqa", "answers", ...),
    _asked("vqa", "answer", {"a": 1}, "not a string or a list of strings"),
    _asked("vqa", "answer", None, "not a string or a list of strings"),
    _asked("vqa", "question", None, "'question' is missing"),
    _asked("vqa", "image", ["a.png"], "not a file name"),
    _asked("vqa", "question_id", False, "neither text nor a number"),
    _asked("vqa", "kind", "\udfff", "surrogate"),
    _asked("vqa", "answer", ["Ann", "Anna"]),
    Case("chartqa_of_a_split_that_is_not_there", partial(_refuse, {**CHART, "split": "dev"}, {}), ("dev_human.json",)),
    Case("docvqa_of_a_split_that_is_there_twice",
         partial(_refuse, DOC, {"val_v1.0.json": [], "val_v1.0_withQT.json": []}), ("there twice",)),
]  # fmt: skip


def _row(rows: dict[str, list[Any]], columns: dict[str, Any], world: World) -> None:
    table = datasets.Dataset.from_dict(rows)
    (world.folder / "rows").mkdir()
    table.to_parquet(str(world.folder / "rows/x.parquet"))
    spec = {"_target_": "data.sources.huggingface.HuggingfaceConfig", "dataset": "rows", "image": None, **columns}
    source = parse_plugin(SourceConfig, spec, PACKAGE, "here").open("x", world.folder, world.folder / "cache")
    for index in range(len(source)):
        for ref in source[index].images:
            from data.images import load

            load(ref)


def _hf(name: str, columns: dict[str, Any], *says: str, **rows: list[Any]) -> Case:
    return Case(f"huggingface_{name}", partial(_row, rows, columns), says)


TALK, ASK = {"conversations": "talk"}, {"question": "q", "answers": "a"}
HUGGINGFACE = [
    _hf("role", TALK, "not a turn", talk=[[{"from": "robot", "value": "x"}]]),
    _hf("text", TALK, "not a turn", talk=[[{"from": "human", "value": None}]]),
    _hf("turns_of_text", TALK, "not a turn", talk=[["hello"]]),
    _hf("no_turns", TALK, "not a list of turns", talk=[[], [{"from": "human", "value": "x"}]]),
    _hf("number_for_a_question", ASK, "are not text", q=[3], a=["x"]),
    _hf("column", ASK, "no a; there are q", q=["x"]),
    _hf("absolute_path", {**ASK, "image": "i"}, "outside its root", q=["x"], a=["y"],
        i=[{"bytes": None, "path": "/etc/passwd"}]),
    _hf("path_that_leaves", {**ASK, "image": "i"}, "outside its root", q=["x"], a=["y"],
        i=[{"bytes": None, "path": "../x.png"}]),
    _hf("path_with_nul", {**ASK, "image": "i"}, "not a file name", q=["x"], a=["y"],
        i=[{"bytes": None, "path": "a\0b"}]),
    _hf("image_of_nothing", {**ASK, "image": "i"}, "neither bytes nor a path", q=["x"], a=["y"],
        i=[{"bytes": None, "path": ""}]),
    _hf("image_that_is_none", {**ASK, "image": "i"}, "cannot be decoded", q=["x"], a=["y"],
        i=[{"bytes": b"GIF89a", "path": None}]),
]  # fmt: skip


def _said(name: str, turns: Sequence[tuple[Any, Any]], images: int, *says: str, **options: Any) -> Case:
    pictures = [Image.new("RGB", (4, 4))] * images
    return Case(f"turns_{name}", lambda world: world.processor.encode(turns, pictures, sample_id="s", **options), says)


def _called(name: str, *says: str, **arguments: Any) -> Case:
    return Case(f"call_{name}", lambda world: world.processor(**arguments), says)


ASKED = [("user", "<image>\nwhat?"), ("assistant", "this")]
SAID = [
    _said("none", [], 0, "no user's turn"),
    _said("of_the_system_alone", [("system", "be brief")], 0, "no user's turn"),
    _said("of_an_unknown_role", [("tool", "3"), ("assistant", "3")], 0, "tool, assistant"),
    _said("of_one_speaker", [("user", "a"), ("user", "b")], 0, "user, user"),
    _said("with_an_image_too_many", ASKED, 2, "1 <image> in the user's turns, 2 image(s)"),
    _said("with_an_image_too_few", [("user", "<image><image>"), ("assistant", "a")], 1, "2 <image>"),
    _said("beyond_the_limit", ASKED, 1, "at most 5", max_length=5),
    _said("that_cannot_be_cut", ASKED, 1, "every image token", max_length=5, overlength="truncate_answer"),
    _said("under_an_unknown_rule", ASKED, 1, "truncate_answer", overlength="cut"),
    _said("with_a_placeholder_in_plain_text", [("user", "what is <image>?"), ("assistant", "a tag")], 0),
    _called("without_text", "exactly one of text and conversations"),
    _called("with_both", "exactly one", text="a", conversations=[[("user", "a")]]),
    _called("for_tensors_of_numpy", "return_tensors", text="a", return_tensors="np"),
    _called("with_a_forgotten_image", "1 <image> and 0 image(s)", text="<image> what?"),
    _called("with_an_image_in_excess", "0 <image> and 1 image(s)", text="what?", images=Image.new("RGB", (2, 2))),
    _called("that_is_answered", "nothing is asked", conversations=[[("user", "a"), ("assistant", "b")]]),
    Case("template_unknown", lambda world: world.processor.with_template("v2"), ("v2", "plain, v1, chat")),
]

CASES = [
    *(Case(f"record_{name}", partial(judge, name=name), _says(name)) for name in RECORDS),
    *FILES, *OTHER_FORMATS, *HUGGINGFACE, *SAID,
]  # fmt: skip
