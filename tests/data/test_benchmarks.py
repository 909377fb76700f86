"""The published layouts of the evaluation benchmarks, a few records of each, and what is wrong with a damaged one."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from anchorformer.errors import UserError
from anchorformer.schema import parse_plugin
from data.record import Record
from data.sources.base import PACKAGE, SourceConfig

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def records(root: Path, name: str, **values: Any) -> list[Record]:
    module, _, cls = name.rpartition(".")
    spec = {"_target_": f"data.sources.{module}.{cls}", **values}
    source = parse_plugin(SourceConfig, spec, PACKAGE, "data.sources.x").open("x", root, root / "cache")
    source.check_records()
    return [source[index] for index in range(len(source))]


def asked(record: Record) -> str:
    return record.turns[0].text.removeprefix("<image>\n")


def image(record: Record, root: Path) -> str:
    (ref,) = record.images
    assert ref.path is not None
    return ref.path.relative_to(root).as_posix()


def test_textvqa_with_and_without_ocr_tokens(root: Path) -> None:
    entries = [
        {"question_id": 1, "image_id": "x", "question": "What brand?", "answers": ["dakota"] * 10},
        {"question_id": 2, "image_id": "x", "question": "what year?", "answers": ["2009"] * 10},
    ]
    prompts = [
        {"question_id": "x", "image": "x.jpg", "text": f"what brand?\nReference OCR token: DAKOTA, 2009{SHORT}"},
        {"question_id": "x", "image": "x.jpg", "text": f"what year?\nReference OCR token: DAKOTA{SHORT}"},
    ]
    write(root / "textvqa/TextVQA_0.5.1_val.json", {"data": entries})
    write(root / "textvqa/ocr.jsonl", "\n".join(map(json.dumps, prompts)))
    (root / "textvqa/train_images").mkdir()
    plain = records(root, "textvqa.TextvqaConfig", split="val")
    assert [asked(record) for record in plain] == [f"What brand?{SHORT}", f"what year?{SHORT}"]
    assert (image(plain[0], root), plain[1].id, len(plain[1].references)) == ("textvqa/train_images/x.jpg", "2", 10)
    first, second = records(root, "textvqa.TextvqaConfig", split="val", ocr="ocr.jsonl")
    assert asked(first) == f"What brand?\nReference OCR token: DAKOTA, 2009{SHORT}"
    assert asked(second) == f"what year?\nReference OCR token: DAKOTA{SHORT}"
    write(root / "textvqa/ocr.jsonl", json.dumps(prompts[0]))
    with pytest.raises(UserError, match=r"no prompt with OCR tokens in ocr\.jsonl"):
        records(root, "textvqa.TextvqaConfig", split="val", ocr="ocr.jsonl")


def test_vqav2_joins_questions_and_annotations(root: Path) -> None:
    questions = [{"image_id": 42, "question": "what?", "question_id": 420}]
    votes = [{"answer": "red", "answer_id": n, "answer_confidence": "yes"} for n in range(9)] + [{"answer": "blue"}]
    annotation = {"question_id": 420, "answers": votes, "multiple_choice_answer": "red"}
    write(root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(root / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": [annotation]})
    write(root / "vqav2/v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": questions})
    (root / "coco").mkdir()
    (record,) = records(root, "vqav2.Vqav2Config", split="val2014")
    assert image(record, root) == "coco/val2014/COCO_val2014_000000000042.jpg"
    assert (record.id, record.turns[1].text, record.references.count("red")) == ("420", "red", 9)
    (record,) = records(root, "vqav2.Vqav2Config", split="test-dev2015")
    assert image(record, root) == "coco/test2015/COCO_test2015_000000000042.jpg"
    assert len(record.turns) == 1
    write(root / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": []})
    with pytest.raises(UserError, match="no annotation of this question"):
        records(root, "vqav2.Vqav2Config", split="val2014")


def test_gqa(root: Path) -> None:
    entry = {"imageId": "n161", "question": "Is it red?", "answer": "no"}
    write(root / "gqa/testdev_balanced_questions.json", {"201": entry})
    (root / "gqa/images").mkdir()
    (record,) = records(root, "gqa.GqaConfig", split="testdev")
    assert (record.id, asked(record), record.turns[1].text) == ("201", f"Is it red?{SHORT}", "no")
    assert image(record, root) == "gqa/images/n161.jpg"
    write(root / "gqa/testdev_balanced_questions.json", [entry])
    with pytest.raises(UserError, match="published layout"):
        records(root, "gqa.GqaConfig", split="testdev")


def test_pope_counts_its_categories_apart(root: Path) -> None:
    for category in ("adversarial", "popular", "random"):
        entry = {"question_id": 1, "image": "COCO_val2014_1.jpg", "text": f"Is there a {category}?", "label": "no"}
        write(root / f"pope/coco/coco_pope_{category}.json", json.dumps(entry) + "\n")
    (root / "coco/val2014").mkdir(parents=True)
    found = records(root, "pope.PopeConfig")
    assert [record.id for record in found] == ["adversarial/1", "popular/1", "random/1"]
    assert [dict(record.meta)["kind"] for record in found] == ["adversarial", "popular", "random"]
    assert asked(found[2]) == f"Is there a random?{SHORT}"
    write(root / "pope/coco/coco_pope_random.json", "{}\n{")
    with pytest.raises(UserError, match="line 2"):
        records(root, "pope.PopeConfig")


def test_mme_in_both_of_its_layouts(root: Path) -> None:
    folder = root / "MME_Benchmark_release_version"
    text = "Is there a dog? Please answer yes or no.\tYes\nIs it a cat? Please answer yes or no.\tNo\n"
    write(folder / "existence/0001.txt", text)
    write(folder / "existence/0001.jpg", b"x")
    write(folder / "artwork/questions_answers_YN/7.txt", text)
    write(folder / "artwork/images/7.png", b"x")
    found = records(root, "mme.MmeConfig")
    assert [dict(record.meta)["kind"] for record in found] == ["existence", "existence", "artwork", "artwork"]
    assert [dict(record.meta)["image"] for record in found[1:3]] == ["existence/0001.jpg", "artwork/images/7.png"]
    assert (asked(found[0]), found[1].turns[1].text) == (f"Is there a dog?{SHORT}", "no")
    # The same content under another name is another image: names decide, not only what is in the files.
    (folder / "existence/0001.txt").rename(folder / "existence/0002.txt")
    (folder / "existence/0001.jpg").rename(folder / "existence/0002.png")
    assert dict(records(root, "mme.MmeConfig")[0].meta)["image"] == "existence/0002.png"
    (folder / "existence/0002.png").unlink()
    with pytest.raises(UserError, match=r"0002\.txt: its image is missing"):
        records(root, "mme.MmeConfig")


def test_scienceqa_takes_the_questions_with_an_image(root: Path) -> None:
    problem = {
        "question": "Which?", "choices": ["cat", "dog"], "answer": 1, "hint": "Look.", "image": "image.png",
        "split": "test", "subject": "natural science",
    }  # fmt: skip
    problems = {"3": problem, "4": {**problem, "image": None}, "5": {**problem, "split": "train"}}
    write(root / "scienceqa/problems.json", problems)
    write(root / "scienceqa/pid_splits.json", {"test": ["3", "4"], "train": ["5"]})
    (root / "scienceqa/images").mkdir()
    (record,) = records(root, "scienceqa.ScienceqaConfig", split="test")
    assert asked(record) == f"Context: Look.\nWhich?\nA. cat\nB. dog{LETTER}"
    assert (record.turns[1].text, image(record, root)) == ("B", "scienceqa/images/test/3/image.png")
    with pytest.raises(UserError, match="no split 'dev'"):
        records(root, "scienceqa.ScienceqaConfig", split="dev")


def table(*rows: dict[str, Any]) -> str:
    columns = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image")
    lines = [columns, *([str(row.get(name, "")) for name in columns] for row in rows)]
    return "".join("\t".join(line) + "\n" for line in lines)


def test_mmbench_turns_the_options_and_their_letter(root: Path) -> None:
    picture = base64.b64encode(b"an image, " * 9).decode()
    row = {"index": 7, "question": "Which?", "A": "cat", "B": "dog", "C": "owl", "answer": "B", "category": "animals"}
    write(root / "mmbench/t.tsv", table({**row, "image": picture}, {**row, "index": 8, "image": "7"}))
    found = records(root, "mmbench.MmbenchConfig", file="mmbench/t.tsv")
    assert [record.id for record in found] == ["7/0", "7/1", "7/2", "8/0", "8/1", "8/2"]
    assert [record.turns[1].text for record in found[:3]] == ["B", "A", "C"]
    assert asked(found[1]) == f"Which?\nA. dog\nB. owl\nC. cat{LETTER}"
    for record in found:  # a row may name another one's image
        assert record.images[0].path is not None
        assert record.images[0].path.read_bytes() == b"an image, " * 9
    once = records(root, "mmbench.MmbenchConfig", file="mmbench/t.tsv", circular=False)
    assert [record.id for record in once] == ["7/0", "8/0"]
    write(root / "mmbench/t.tsv", table({**row, "image": "no base64 at all!" * 9}))
    with pytest.raises(UserError, match="index 7 has no image"):
        records(root, "mmbench.MmbenchConfig", file="mmbench/t.tsv")
    write(root / "mmbench/t.tsv", table({**row, "index": "../7", "image": picture}))
    with pytest.raises(UserError, match="not numbered"):
        records(root, "mmbench.MmbenchConfig", file="mmbench/t.tsv")


def test_vizwiz(root: Path) -> None:
    votes = [{"answer": "basil", "answer_confidence": "yes"}] * 10
    write(root / "vizwiz/Annotations/val.json", [{"image": "v1.jpg", "question": "What is it?", "answers": votes}])
    write(root / "vizwiz/Annotations/test.json", [{"image": "t1.jpg", "question": "What is it?"}])
    for split in ("val", "test"):
        (root / "vizwiz" / split).mkdir()
    (record,) = records(root, "vizwiz.VizwizConfig", split="val")
    assert "respond with 'Unanswerable'" in asked(record)
    assert (record.id, record.references) == ("v1.jpg", ("basil",) * 10)
    (record,) = records(root, "vizwiz.VizwizConfig", split="test")
    assert (image(record, root), len(record.turns)) == ("vizwiz/test/t1.jpg", 1)


def test_mm_vet_has_questions_only(root: Path) -> None:
    entry = {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr"]}
    write(root / "mm-vet/mm-vet.json", {"v1_0": entry})
    (root / "mm-vet/images").mkdir()
    (record,) = records(root, "mm_vet.MmVetConfig")
    assert (record.id, asked(record), record.references, len(record.turns)) == ("v1_0", "What is x?", (), 1)
