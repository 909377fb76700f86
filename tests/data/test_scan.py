"""The data doctor finds every planted defect, says so in the same order each time, and exits by the threshold."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest
import yaml
from PIL import Image

from anchorformer.errors import UserError
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.schema import parse, parse_plugin
from anchorformer.template_names import TEMPLATE_NAMES
from data.__main__ import main
from data.config import DataConfig
from data.folders import processor_folder
from data.loader import Loader
from data.processor import open_processor
from data.scan import samples, scan
from data.scan_config import ScanConfig, TemplateName
from data.sources.base import PACKAGE, SourceConfig
from data.verbs.scan import compose_scan
from data.verdicts import Defect

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
    ("lost", Defect.imageless),
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
    assert list(Path(config.data.cache_dir).glob("*-truncate_answer-100.lengths.npy")), "counted as training counts"


def test_a_null_image_under_a_placeholder(processor: AnchorFormerProcessor, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]
    plain = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (9, 8)), None, None], "talk": [turns, turns, plain]})
    rows.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "x.parquet"))
    spec = {"_target_": "data.sources.huggingface.HuggingfaceConfig", "dataset": "x.parquet", "conversations": "talk"}
    values = {"root": str(tmp_path), "sources": {"hf": spec}, "cache_dir": str(tmp_path / "cache")}
    report = scan(ScanConfig(data=parse(DataConfig, values, "data"), processor="p"), processor)
    found = [(name, finding.defect, finding.detail) for _, name, finding in report.findings]
    assert found == [("#1", Defect.imageless, "1 <image>, 0 image(s)")]


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
    shown = capsys.readouterr().out
    assert "0 of 3 records (0.00%)" in shown
    rows = [line.split() for line in shown.splitlines() if " ok " in line]
    assert [row[:3] for row in rows] == [["captions", "ok", "3"]], "a clean source has a row"
    corpus.add("gone", "gone.png")
    corpus.write()
    assert main(command) == 1
    assert main([*command, "max_bad_share=0.25"]) == 0
    assert main([*command, "max_bad_share=0.24"]) == 1


def _opened(overrides: list[str]) -> AnchorFormerProcessor:
    config = compose_scan(overrides)
    return open_processor(config, processor_folder(config))


def test_bare_tokenizer(processor: AnchorFormerProcessor, corpus: Any, tmp_path: Path) -> None:
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    overrides = [*_write_group(corpus), f"processor={tmp_path / 'tokenizer'}"]
    with pytest.raises(UserError, match="processor_config"):
        _opened(overrides)
    opened = _opened([*overrides, "num_image_tokens=17", "template=chat"])
    assert (opened.num_image_tokens, opened.template) == (17, "chat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="an empty folder"):
        _opened([*overrides[:-1], f"processor={tmp_path / 'empty'}", "num_image_tokens=17", "template=v1"])
    (tmp_path / "empty" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        _opened([*overrides[:-1], f"processor={tmp_path / 'empty'}", "num_image_tokens=17", "template=v1"])


def test_the_processor_of_a_run_is_its_models(processor: AnchorFormerProcessor, corpus: Any, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "finetune"
    processor.save_pretrained(run / "model")
    overrides = _write_group(corpus)
    assert _opened([*overrides, f"processor={run}"]).num_image_tokens == processor.num_image_tokens
    with pytest.raises(UserError) as caught:
        _opened([*overrides, f"processor={run.parent}"])
    assert caught.value.remedy == f"pass processor={run}"


@pytest.mark.parametrize(("overrides", "expected"), [
    (["data=docvq", "data.root=x", "processor=y"], "docvqa"),
    (["data=miniworld", "data.root=x", "processor=y"], "'miniworld_align' or 'miniworld_finetune'?"),
    (["data.root=x", "processor=y"], "one of align, chartqa"),
    (["data=docvqa", "processor=y"], "data.root"),
    (["shwo=1"], "'show'?"),
    (["data=docvqa", "max_length=3"], "'data.max_length'?"),
    (["--data", "docvqa"], "data=docvqa, without dashes"),
    (["--data=docvqa"], "data=docvqa, without dashes"),
    (["show"], "show=..."),
    (["data=docvqa,chartqa"], '"data=[docvqa,chartqa]"'),
    (["processor=a=b"], "'key=\"the value\"'"),
    (["data=docvqa", "data.root=x", "processor=y", "template=vicuna"], "template='vicuna'"),
    (["data=docvqa", "data.root=x", "processor=y", "data.max_lenght=3"], "'data.max_length'?"),
    (["data=docvqa", "data.root=x", "processor=y", "+max_bad_sharee=3"], "'max_bad_share'?"),
    (["data=docvqa", "data.root=x", "processor=y", "data.max_length=long"], "valid integer"),
    (["data=docvqa", "data.root=x", "processor=y", "data.overlength=cut"], "truncate_answer"),
])  # fmt: skip
def test_mistakes_in_the_command(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_scan(overrides)
    assert expected in str(caught.value)
    assert not any(word in str(caught.value) for word in ("python -m train", "stage.template", "Exception"))


def test_unknown_verb_is_answered_with_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="unknown verb") as caught:
        main(["scam", "data=docvqa"])
    assert caught.value.remedy == "python -m data scan data=docvqa"
    assert "usage: python -m data scan" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["scan", "--help"], ["scan", "data=docvqa", "-h"]])
def test_help_is_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "usage: python -m data scan" in shown
    assert all(word in shown for word in ("miniworld_align", "data.max_length=2048", "show=3"))


def test_every_template_can_be_named() -> None:
    assert get_args(TemplateName) == TEMPLATE_NAMES


def test_a_refused_command_has_loaded_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text("{}")
    script = (
        "import sys; from data.__main__ import main; from anchorformer.errors import UserError\n"
        f"try: main(['scan', 'data=docvqa', 'data.root={tmp_path}', 'processor={tmp_path}'])\n"
        "except UserError as error: assert 'train_v1.0.json' in str(error)\n"
        "else: sys.exit(3)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


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


def test_a_model_that_has_to_look_first_is_not_scanned_with(
    processor: AnchorFormerProcessor, corpus: Any, tmp_path: Path
) -> None:
    looks = AnchorFormerProcessor(processor.image_transform, processor.tokenizer, None, template="chat")
    looks.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="a scan runs no model") as caught:
        _opened([*_write_group(corpus), f"processor={tmp_path / 'model'}"])
    assert "num_image_tokens=200" in caught.value.remedy
