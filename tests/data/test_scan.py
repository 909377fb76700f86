"""The data doctor finds every planted defect, says so in the same order each time, and exits by the threshold."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image

from anchorformer.errors import UserError
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.schema import parse, parse_plugin
from data.__main__ import compose_scan, main, open_processor
from data.config import DataConfig
from data.examine import Defect
from data.loader import Loader
from data.scan import ScanConfig, samples, scan
from data.sources.base import PACKAGE, SourceConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ward(corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One record per defect, and two that are sound."""
    corpus.image("good.png")
    corpus.add("good", "good.png")
    corpus.add("text only", None, "what does an image mean?")
    corpus.add("lost", None, "<image> what is this?")
    corpus.add("missing", "missing.png")
    corpus.image("truncated.jpg", (200, 200))
    corpus.spoil("truncated.jpg", "truncated")
    corpus.add("truncated", "truncated.jpg")
    corpus.image("zero.png")
    corpus.spoil("zero.png", "empty")
    corpus.add("zero", "zero.png")
    corpus.image("gif.png", format="GIF")
    corpus.add("gif", "gif.png")
    corpus.image("cmyk.jpg", mode="CMYK")
    corpus.add("cmyk", "cmyk.jpg")
    corpus.image("dot.png", (1, 1))
    corpus.add("dot", "dot.png")
    corpus.image("bomb.png")
    corpus.spoil("bomb.png", "bomb")
    corpus.add("bomb", "bomb.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    corpus.image("turned.jpg", (30, 17), exif=exif)
    corpus.add("turned", "turned.jpg")
    shutil.copy(corpus.root / "images/good.png", corpus.root / "images/twin.png")
    corpus.add("twin", "twin.png")
    (corpus.root / "images/out").symlink_to(tmp_path_factory.mktemp("outside"))
    corpus.add("sly", "out/x.png")
    corpus.add("marks", "good.png")
    corpus.records[-1]["conversations"][0]["value"] = "<image><image> two?"
    corpus.add("good", "good.png", "a second time?")
    corpus.add("silent", "good.png", answer="")
    corpus.records.append({"id": "asks", "conversations": [{"from": "human", "value": "and?"}]})
    corpus.add("long", "good.png", answer="x" * 200)
    corpus.records.append({"id": "twice", "conversations": [{"from": "human", "value": "a"}] * 2})
    return corpus


EXPECTED = {
    ("missing", Defect.missing), ("truncated", Defect.unreadable), ("zero", Defect.unreadable),
    ("gif", Defect.mislabelled), ("cmyk", Defect.mode), ("dot", Defect.tiny), ("bomb", Defect.oversized),
    ("turned", Defect.rotated), ("twin", Defect.duplicate_image), ("sly", Defect.outside), ("marks", Defect.mismatch),
    ("lost", Defect.mismatch),
    ("good~2", Defect.duplicate_id), ("silent", Defect.empty_answer), ("asks", Defect.no_targets),
    ("long", Defect.too_long), ("twice", Defect.refused),
}  # fmt: skip


def _config(corpus: Any, **values: Any) -> ScanConfig:
    return ScanConfig(data=corpus.config(max_length=100), processor="unused", **values)


def test_every_planted_defect_is_found(ward: Any, processor: AnchorFormerProcessor, tmp_path: Path) -> None:
    config = _config(ward, out=str(tmp_path / "findings.jsonl"))
    report = scan(config, processor)
    assert {(name, finding.defect) for _, name, finding in report.findings} == EXPECTED
    assert all(finding.detail for _, _, finding in report.findings)
    assert report.total == len(ward.records)
    assert len(report.bad) == sum(defect.is_bad for _, defect in EXPECTED)
    assert scan(config, processor).table() == report.table()
    table = report.table()
    assert all(f"{defect.value}: " in table for _, defect in EXPECTED)
    assert f"{len(report.bad)} of {report.total} records" in table
    lines = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    assert {(line["id"], Defect(line["defect"])) for line in lines} == EXPECTED


def test_truncation_is_a_note_where_the_rule_allows_it(ward: Any, processor: AnchorFormerProcessor) -> None:
    config = ScanConfig(data=ward.config(max_length=100, overlength="truncate_answer"), processor="unused")
    found = {(name, finding.defect) for _, name, finding in scan(config, processor).findings}
    assert found == EXPECTED - {("long", Defect.too_long)} | {("long", Defect.shortened)}


def test_a_null_image_under_a_placeholder(processor: AnchorFormerProcessor, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]
    plain = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (9, 8)), None, None], "talk": [turns, turns, plain]})
    rows.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "x.parquet"))
    spec = {"_target_": "data.sources.huggingface.HuggingfaceConfig", "dataset": "x.parquet", "conversations": "talk"}
    values = {"root": str(tmp_path), "sources": {"hf": spec}, "cache_dir": str(tmp_path / "cache")}
    report = scan(ScanConfig(data=parse(DataConfig, values, "data"), processor="p"), processor)
    found = [(name, finding.defect, finding.detail) for _, name, finding in report.findings]
    assert found == [("#1", Defect.mismatch, "1 <image>, 0 image(s)")]


def test_shown_samples_mark_what_is_supervised(
    ward: Any, processor: AnchorFormerProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = list(samples(_config(ward, show=2), processor))
    assert len(shown) == 2
    assert "[5 anchors]" in shown[0]
    assert "«this</s>»" in shown[0]
    monkeypatch.delenv("NO_COLOR")
    assert "\033[32;1mthis</s>\033[0m" in next(samples(_config(ward), processor))


def _write_group(corpus: Any) -> list[str]:
    """Overrides for a source that no YAML names, written onto a shipped config."""
    corpus.write()
    own = "data.sources.captions"
    return [
        "data=miniworld_align",
        f"data.root={corpus.root}",
        f"{own}.annotations=records.json",
        f"{own}.images=images",
        f"data.cache_dir={corpus.root / 'cache'}",
    ]


def test_exit_code_follows_the_threshold(
    corpus: Any, processor: AnchorFormerProcessor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "processor"
    processor.save_pretrained(folder)
    corpus.image("good.png")
    for index in range(3):
        corpus.add(index, "good.png")
    command = ["scan", *_write_group(corpus), f"processor={folder}"]
    assert main(command) == 0
    assert "0 of 3 records (0.00%)" in capsys.readouterr().out
    corpus.add("gone", "gone.png")
    corpus.write()
    assert main(command) == 1
    assert main([*command, "max_bad_share=0.25"]) == 0
    assert main([*command, "max_bad_share=0.24"]) == 1


def test_bare_tokenizer(processor: AnchorFormerProcessor, corpus: Any, tmp_path: Path) -> None:
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    overrides = [*_write_group(corpus), f"processor={tmp_path / 'tokenizer'}"]
    with pytest.raises(UserError, match="processor_config"):
        open_processor(compose_scan(overrides))
    opened = open_processor(compose_scan([*overrides, "num_image_tokens=17", "template=v1"]))
    assert (opened.num_image_tokens, opened.template) == (17, "v1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer"):
        open_processor(
            compose_scan([*overrides[:-1], f"processor={tmp_path / 'empty'}", "num_image_tokens=17", "template=v1"])
        )


@pytest.mark.parametrize(("overrides", "expected"), [
    (["data=docvq", "data.root=x", "processor=y"], "docvqa"),
    (["data=docvqa", "processor=y"], "data.root"),
    (["data=docvqa", "data.root=x", "processor=y", "data.max_lenght=3"], "'max_length'?"),
    (["data=docvqa", "data.root=x", "processor=y", "+max_bad_sharee=3"], "'max_bad_share'?"),
    (["data=docvqa", "data.root=x", "processor=y", "data.max_length=long"], "valid integer"),
    (["data=docvqa", "data.root=x", "processor=y", "data.overlength=cut"], "truncate_answer"),
])  # fmt: skip
def test_mistakes_in_the_command(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_scan(overrides)
    assert expected in str(caught.value)


def test_unknown_verb() -> None:
    with pytest.raises(UserError, match="unknown verb"):
        main(["scam"])


@pytest.mark.parametrize("path", sorted((ROOT / "conf/data").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_data_configs_compose_and_parse(path: Path) -> None:
    config = compose_scan([f"data={path.stem}", "data.root=/data", "processor=p"]).data
    assert config.sources
    for name, spec in config.sources.items():
        source = parse_plugin(SourceConfig, spec, PACKAGE, name)
        assert source.weight > 0
    assert isinstance(config, DataConfig)


def test_default_mixture_holds_the_published_sets() -> None:
    config = compose_scan(["data=finetune", "data.root=/data", "processor=p"]).data
    assert sorted(config.sources) == ["chartqa", "docvqa", "llava_665k"]
    assert config.sources["chartqa"]["kinds"] == ["human", "augmented"]
    text = yaml.safe_load((ROOT / "conf/data/finetune_mixture.yaml").read_text())
    assert {name: spec["weight"] for name, spec in text["sources"].items()} == dict.fromkeys(config.sources, 1.0)


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_real_files_load_and_scan(
    realdata_root: Path, processor: AnchorFormerProcessor, tmp_path: Path, stage: str
) -> None:
    overrides = [f"data=real_tiny_{stage}", f"data.root={realdata_root}", "processor=p", "data.max_length=512",
                 "data.overlength=truncate_answer", f"data.cache_dir={tmp_path}"]  # fmt: skip
    config = compose_scan(overrides)
    run = Counter()  # type: ignore[var-annotated]
    loader = Loader(_run(config.data), processor, 0, 2)
    for step in loader:
        run["steps"] += 1
        run["images"] += sum(batch.tiles_B3HW.shape[0] for batch in step)
        run["targets"] += sum(batch.num_supervised for batch in step)
    assert run["steps"] == 3
    assert run["targets"] > run["images"] > 0
    for spec in config.data.sources.values():
        assert (realdata_root / spec.get("folder", spec.get("images", ""))).is_dir()


def _run(data: DataConfig) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(
        data=data,
        stage=SimpleNamespace(global_batch=16, epochs=None, max_steps=3),
        hardware=SimpleNamespace(micro_batch=4),
        seed=0,
    )


def test_scan_names_unreadable_real_files(
    realdata_root: Path, processor: AnchorFormerProcessor, tmp_path: Path
) -> None:
    folder = "restricted/docvqa/oddities_lfs_pointer"
    spec = {"_target_": "data.sources.docvqa.DocvqaConfig", "split": "val", "folder": folder}
    native = {"_target_": "data.sources.llava.LlavaConfig", "images": "restricted/llava_instruct/oddities_native",
              "annotations": "restricted/llava_instruct/oddities_native/multi_images.json"}  # fmt: skip
    values = {"root": str(realdata_root), "sources": {"pointers": spec, "native": native},
              "cache_dir": str(tmp_path), "max_length": 4096}  # fmt: skip
    report = scan(ScanConfig(data=parse(DataConfig, values, "data"), processor="p"), processor)
    total = len(json.loads((realdata_root / folder / "val_v1.0_withQT.json").read_text())["data"])
    kinds = Counter((source, finding.defect) for source, _, finding in report.findings)
    assert kinds["pointers", Defect.unreadable] == total
    assert kinds["native", Defect.mislabelled] > 0, "JPEG bytes under .png"
