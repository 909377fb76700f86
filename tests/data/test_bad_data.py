"""One percent of bad images and records in a large set: scan finds them, `skip` counts them, `error` names them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from anchorformer.contracts import Batch
from anchorformer.errors import UserError
from anchorformer.images import ImageTransform, open_image
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.schema import parse
from data.config import DataConfig
from data.loader import Loader
from data.mixture import Mixture
from data.scan import scan
from data.scan_config import ScanConfig
from data.verdicts import Defect, Verdict
from tests.spoilt import IMAGES, RECORDS, encoded, spoken

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 1200
BAD_IMAGES = ("missing", "truncated_jpeg", "zero_bytes", "lfs_pointer", "folder", "20k_x_20k", "bomb")
BAD_RECORDS = ("no_image_token", "two_tokens_one_image", "unknown_role", "lone_surrogate", "100k_characters")
UNUSUAL_IMAGES = ("gif_named_jpg", "cmyk", "16_bit", "1_x_1", "exif_rotated")
UNUSUAL_RECORDS = ("nul", "int_id")


@dataclass(frozen=True)
class Planted:
    """A set in LLaVA's format, and the defects that lie in it: (id, defect)."""

    root: Path
    expected: set[tuple[str, Defect]]

    def config(self, **values: Any) -> DataConfig:
        source = {"_target_": "data.sources.llava.LlavaConfig", "annotations": "mix.json", "images": "images"}
        fixed = {"root": str(self.root), "cache_dir": str(self.root / "cache"), "max_length": 400}
        return parse(DataConfig, {**fixed, "sources": {"mix": source}, **values}, "data")

    def ids(self, *verdicts: Verdict) -> set[str]:
        return {f"mix/{name}" for name, defect in self.expected if defect.verdict in verdicts}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Twelve bad ones among 1,200, spread over all of them, and nine that are merely unusual."""
    root = tmp_path_factory.mktemp("planted")
    images = root / "images"
    images.mkdir()
    (images / "good.png").write_bytes(encoded("PNG"))
    records: list[Any] = [
        {"id": f"r{number}", "conversations": spoken("why?" if number % 5 == 0 else "<image>\nwhat?", f"so {number}")}
        | ({} if number % 5 == 0 else {"image": "good.png"})
        for number in range(TOTAL)
    ]
    expected = set()
    places = iter(range(3, TOTAL, 53))
    for name in (*BAD_IMAGES, *UNUSUAL_IMAGES):
        file, plant, defect = IMAGES[name]
        plant(images / file)
        records[next(places)] = {"id": name, "image": file, "conversations": spoken()}
        expected.add((name, defect))
    for name in (*BAD_RECORDS, *UNUSUAL_RECORDS):
        raw, defect = RECORDS[name]
        records[next(places)] = {**raw, "id": raw["id"] if name == "int_id" else name}
        expected |= {(name, defect)} if defect else set()
    for _ in range(2):
        records[next(places)]["id"] = "r1"
    expected |= {("r1~2", Defect.duplicate_id), ("r1~3", Defect.duplicate_id)}
    (root / "mix.json").write_text(json.dumps(records))
    return Planted(root, expected)


def _run(data: DataConfig, **stage: Any) -> Any:
    return SimpleNamespace(
        data=data, stage=SimpleNamespace(**{"global_batch": 32, "epochs": 1.0, "max_steps": None, **stage}),
        hardware=SimpleNamespace(micro_batch=16), seed=5,
    )  # fmt: skip


def _trained(config: DataConfig, processor: AnchorFormerProcessor) -> list[tuple[tuple[str, ...], int, list[int]]]:
    """What a run would train on: per micro-batch its samples, how many were skipped, and every target."""
    batches: list[Batch] = [batch for step in Loader(_run(config), processor, 0, 1) for batch in step]
    return [(batch.sample_ids, batch.num_skipped, batch.targets_Q.tolist()) for batch in batches]


LENIENT = {"on_bad_image": "skip", "on_bad_record": "skip", "overlength": "drop"}


def test_scan_finds_all_and_nothing_else(planted: Planted, processor: AnchorFormerProcessor) -> None:
    report = scan(ScanConfig(data=planted.config(), processor="-"), processor)
    assert {(name, finding.defect) for _, name, finding in report.findings} == planted.expected
    assert len(report.findings) == len(planted.expected)
    assert all(finding.detail for _, _, finding in report.findings)
    assert (len(report.bad), report.total) == (TOTAL // 100, TOTAL)
    assert report.table() == scan(ScanConfig(data=planted.config(), processor="-"), processor).table()
    reasons = {name: finding.detail for _, name, finding in report.findings}
    assert reasons["lfs_pointer"] == "a git-LFS pointer"
    assert reasons["folder"] == "Is a directory"
    assert reasons["unknown_role"].startswith("a turn's 'from' is none of human, gpt, system")
    assert "half of a surrogate pair, '\\ud83d'" in reasons["lone_surrogate"]


def test_skipping_counts_what_was_planted(planted: Planted, processor: AnchorFormerProcessor) -> None:
    config = planted.config(**LENIENT)
    mixture = Mixture(config, processor)
    assert (mixture.num_dropped, len(mixture)) == (len(BAD_RECORDS), TOTAL - len(BAD_RECORDS))
    first = _trained(config, processor)
    assert sum(skipped for _, skipped, _ in first) == len(BAD_IMAGES)
    seen = [name for names, _, _ in first for name in names]
    bad = planted.ids(Verdict.image_rule, Verdict.record_rule, Verdict.length_rule)
    every = {mixture.sample_id(number) for number in range(len(mixture))}
    assert set(seen) == every - bad
    assert len(bad) == TOTAL // 100
    assert planted.ids(Verdict.used) <= set(seen)
    for workers in (1, 2):
        assert _trained(replace(config, num_workers=workers), processor) == first


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_is_an_error_is_named(planted: Planted, processor: AnchorFormerProcessor, name: str) -> None:
    source = planted.config(**LENIENT)
    only = planted.root / f"only_{name}.json"
    only.write_text(json.dumps([{"id": name, "image": IMAGES[name][0], "conversations": spoken()}]))
    spec = {**source.sources["mix"], "annotations": only.name}
    config = replace(planted.config(), sources={"mix": spec})
    with pytest.raises(UserError, match=f"sample mix/{name}") as caught:
        list(Loader(_run(config, global_batch=1), processor, 0, 1))
    assert IMAGES[name][0] in caught.value.what


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_record_that_is_an_error_is_named(
    planted: Planted, processor: AnchorFormerProcessor, tmp_path: Path, name: str
) -> None:
    file = planted.root / f"only_{name}.json"
    file.write_text(json.dumps([{"id": "fine", "conversations": spoken("why?")}, {**RECORDS[name][0], "id": name}]))
    spec = {**planted.config().sources["mix"], "annotations": file.name}
    with pytest.raises(UserError) as caught:
        Mixture(replace(planted.config(), sources={"mix": spec}), processor)
    assert name in caught.value.what + caught.value.found
    if RECORDS[name][1] is Defect.malformed:
        assert f"{file}: record 1" in caught.value.what


def test_too_many_bad_records_are_refused_whatever_the_rule(planted: Planted, processor: AnchorFormerProcessor) -> None:
    with pytest.raises(UserError, match="too many records") as caught:
        Mixture(planted.config(**LENIENT, max_dropped_share=0.004), processor)
    assert "mix: 4 that cannot be used (no_image_token, two_tokens_one_image, unknown_role" in caught.value.found


@pytest.mark.parametrize("name", ["cmyk", "16_bit", "32_bit", "float", "exif_rotated", "animation", "gif_named_jpg"])
def test_unusual_pixels_are_seen_as_the_published_code_sees_them(tmp_path: Path, name: str) -> None:
    """LLaVA's `Image.open(path).convert("RGB")`, and then the square: nothing is turned, scaled or refused."""
    file, plant, _ = IMAGES[name]
    plant(tmp_path / file)
    with Image.open(tmp_path / file) as image:
        published = image.convert("RGB")
    tile = ImageTransform(20, (9, 9, 9))
    assert torch.equal(tile(open_image(tmp_path / file)), tile(published))


def test_the_manual_has_the_table() -> None:
    manual = (ROOT / "docs/operations.md").read_text()
    _, _, table = manual.partition("`data/verdicts.py`")
    rows = re.findall(r"^\| (`.+) \|$", table, re.MULTILINE)[: len(Defect)]
    assert rows == [f"`{defect.value}` | {defect.covers} | {defect.verdict.value}" for defect in Defect]
