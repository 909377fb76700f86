"""The feature cache: what it gives back is what the tower says, of these pixels and no others, whole or not at all."""

from __future__ import annotations

import errno
import json
import multiprocessing
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anchorformer.contracts import VisionFeatures
from anchorformer.errors import UserError
from anchorformer.images import normalise, open_image
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.weights import load_model, load_tower
from data import features as features_module
from data import fill as fill_module
from data.config import OnBad
from data.features import FeatureCache
from data.fill import fill
from data.loader import Loader
from data.mixture import Mixture
from tests.conftest import ANCHOR
from train.loss import supervised_loss

CPU = torch.device("cpu")


@pytest.fixture
def processor(tiny_folder: Path) -> AnchorFormerProcessor:
    return AnchorFormerProcessor.from_pretrained(tiny_folder)


@pytest.fixture
def cache(tiny_folder: Path, tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "features", tiny_folder, torch.float32, CPU)


@pytest.fixture
def mixture(filled: Any, processor: AnchorFormerProcessor) -> Mixture:
    return Mixture(filled.config(), processor)


def _fill(cache: FeatureCache, mixture: Mixture, processor: AnchorFormerProcessor, **values: Any) -> None:
    options = {"made_of": "these", "on_bad_image": OnBad.error, **values}
    fill(cache, mixture, range(len(mixture.tokens)), processor.image_transform, **options)


def _entries(cache: FeatureCache) -> list[Path]:
    return sorted(cache.folder.glob("??/*.safetensors"))


def _tiles(mixture: Mixture, processor: AnchorFormerProcessor) -> Tensor:
    images = [open_image(ref.path) for n in range(len(mixture.tokens)) for ref in mixture[n].images if ref.path]
    return processor.image_transform.tiles(images)


def _live(folder: Path, tiles_B3HW: Tensor) -> VisionFeatures:
    config = json.loads((folder / "config.json").read_text())
    features: VisionFeatures = load_tower(folder, torch.float32)(
        normalise(tiles_B3HW, config["image_mean"], config["image_std"])
    )
    return features


@torch.no_grad()
def test_what_is_read_is_what_the_tower_says(
    cache: FeatureCache, mixture: Mixture, processor: AnchorFormerProcessor, tiny_folder: Path
) -> None:
    _fill(cache, mixture, processor)
    tiles = _tiles(mixture, processor)
    assert len(_entries(cache)) == len(tiles) == 8
    read, live = cache.read(tiles.flip(0)), _live(tiny_folder, tiles.flip(0))
    assert read.has_cls is live.has_cls
    for name, tensor in vars(live).items():
        if isinstance(tensor, Tensor):
            assert getattr(read, name).dtype == tensor.dtype
            torch.testing.assert_close(getattr(read, name), tensor, rtol=0, atol=2e-6)
        else:
            assert getattr(read, name) == tensor
    none = cache.read(tiles[:0])
    assert none.tokens_BNV.shape == (0, *live.tokens_BNV.shape[1:])


def test_losses_and_gradients_are_those_of_the_live_tower(
    cache: FeatureCache, filled: Any, processor: AnchorFormerProcessor, tiny_folder: Path
) -> None:
    Stage, Hardware = namedtuple("Stage", "global_batch epochs max_steps"), namedtuple("Hardware", "micro_batch")
    Run = namedtuple("Run", "data stage hardware seed")
    run = Run(filled.config(), Stage(4, 1.0, None), Hardware(2), 3)
    _fill(cache, Mixture(run.data, processor), processor)
    model = load_model(tiny_folder, torch.float32).train()
    model.vision_tower.requires_grad_(False)
    tower = model.vision_tower.forward

    def losses(loader: Loader) -> tuple[list[float], list[Tensor], int]:
        calls = 0

        def counted(*arguments: Any) -> VisionFeatures:
            nonlocal calls
            calls += 1
            return tower(*arguments)

        model.vision_tower.forward = counted
        model.zero_grad()
        found = []
        for batch in [batch for step in loader for batch in step]:
            loss = supervised_loss(model, batch, 1)
            loss.backward()
            found.append(loss.item())
        return found, [parameter.grad.clone() for parameter in model.connector.parameters()], calls

    live, live_grads, live_calls = losses(Loader(run, processor, 0, 1))
    cached, cached_grads, cached_calls = losses(Loader(run, processor, 0, 1, features=cache))
    assert live_calls == len(live)
    assert cached_calls == 0
    torch.testing.assert_close(cached, live, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cached_grads, live_grads, rtol=1e-5, atol=1e-5)


def test_a_blank_stands_for_no_images(cache: FeatureCache, mixture: Mixture, tiny_folder: Path) -> None:
    """A micro-batch of text alone runs the connector, and no tower, whose collectives others would miss."""
    _fill(cache, mixture, AnchorFormerProcessor.from_pretrained(tiny_folder))
    model = load_model(tiny_folder, torch.float32).train()
    model.vision_tower.forward = lambda *_: pytest.fail("the tower ran")
    ids = torch.tensor([[1, 7, 8]])
    none = torch.zeros(0, 3, 28, 28, dtype=torch.uint8)
    out = model(ids, attention_mask=torch.ones_like(ids), pixel_values=none, vision_features=cache.read(none))
    out.logits.sum().backward()
    assert all(not parameter.grad.any() for parameter in model.connector.parameters())


def test_only_what_is_missing_is_computed(
    cache: FeatureCache, mixture: Mixture, processor: AnchorFormerProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(cache, mixture, processor)
    first, second, *others = _entries(cache)
    before = {path: path.stat().st_mtime_ns for path in others}
    first.unlink()
    second.write_bytes(second.read_bytes()[:50])
    (cache.folder / "complete-these").unlink()
    _fill(cache, mixture, processor)
    assert before == {path: path.stat().st_mtime_ns for path in others}
    cache.read(_tiles(mixture, processor))
    assert not list(cache.folder.rglob(".tmp-*"))

    monkeypatch.setattr(fill_module, "load_tower", lambda *_: pytest.fail("the tower was loaded"))
    _fill(cache, mixture, processor)
    with pytest.raises(pytest.fail.Exception):
        _fill(cache, mixture, processor, made_of="those")


@pytest.mark.parametrize(
    ("spoil", "fragment"),
    [
        (lambda path: path.unlink(), "not in the feature cache"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x55"), "another checksum"),
        (lambda path: path.write_bytes(b""), "damaged"),
    ],
)
def test_damage_is_noticed(
    spoil: Any, fragment: str, cache: FeatureCache, mixture: Mixture, processor: AnchorFormerProcessor
) -> None:
    _fill(cache, mixture, processor)
    entry = _entries(cache)[3]
    spoil(entry)
    with pytest.raises(UserError, match=fragment) as caught:
        cache.read(_tiles(mixture, processor))
    assert entry.name in str(caught.value)


def test_the_folder_is_of_one_tower_and_one_way_to_run_it(
    cache: FeatureCache, tiny_folder: Path, assemble_tiny: Any, tmp_path: Path
) -> None:
    def folder(model: Path = tiny_folder, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Path:
        return FeatureCache(tmp_path / "features", model, dtype, device).folder

    fewer = assemble_tiny(selector=ANCHOR | {"num_anchors": 5})
    assert folder() == folder(fewer) == cache.folder
    deeper = assemble_tiny(selector=ANCHOR | {"layer": -1})
    retrained = tmp_path / "retrained"
    shutil.copytree(tiny_folder, retrained)
    manifest = json.loads((retrained / "MANIFEST.json").read_text())
    manifest["files"]["vision_tower.safetensors"]["sha256"] = "0" * 64
    (retrained / "MANIFEST.json").write_text(json.dumps(manifest))
    others = [folder(deeper), folder(retrained), folder(dtype=torch.bfloat16), folder(device=torch.device("cuda"))]
    assert len({cache.folder, *others}) == 5


def test_half_precision_is_kept_as_it_is(
    mixture: Mixture, processor: AnchorFormerProcessor, tiny_folder: Path, tmp_path: Path
) -> None:
    half = FeatureCache(tmp_path / "features", tiny_folder, torch.bfloat16, CPU)
    _fill(half, mixture, processor)
    read = half.read(_tiles(mixture, processor))
    assert read.tokens_BNV.dtype == torch.bfloat16
    assert read.cls_scores_BHN is not None
    assert read.cls_scores_BHN.dtype == torch.float32


def test_no_room_is_said_before_anything_is_written(
    cache: FeatureCache, mixture: Mixture, processor: AnchorFormerProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda _: usage(5000))
    with pytest.raises(UserError, match="no room"):
        _fill(cache, mixture, processor)
    assert not _entries(cache)


def test_a_disk_that_fills_up_keeps_no_half_entry(
    cache: FeatureCache, mixture: Mixture, processor: AnchorFormerProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def half(path: Path, content: bytes) -> int:
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", half)
        with pytest.raises(UserError, match="no room"):
            _fill(cache, mixture, processor)
    assert not _entries(cache)
    assert not list(cache.folder.rglob(".tmp-*.safetensors*"))
    _fill(cache, mixture, processor)
    cache.read(_tiles(mixture, processor))


def test_bad_images_as_in_training(
    cache: FeatureCache, filled: Any, mixture: Mixture, processor: AnchorFormerProcessor
) -> None:
    filled.spoil("4.png", "truncated")
    with pytest.raises(UserError, match=r"4\.png: cannot be decoded"):
        _fill(cache, mixture, processor)
    _fill(cache, mixture, processor, on_bad_image=OnBad.skip)
    assert len(_entries(cache)) == 7


def test_an_image_that_changes_is_missed(
    cache: FeatureCache, filled: Any, mixture: Mixture, processor: AnchorFormerProcessor
) -> None:
    _fill(cache, mixture, processor)
    filled.image("0.png", size=(16, 20))
    with pytest.raises(UserError, match="not in the feature cache"):
        cache.read(_tiles(mixture, processor))


def test_an_empty_cache_is_no_cache(cache: FeatureCache) -> None:
    with pytest.raises(UserError, match="empty"):
        cache.read(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))


def test_several_processes_fill_one_cache(
    cache: FeatureCache, mixture: Mixture, processor: AnchorFormerProcessor
) -> None:
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_fill, args=(cache, mixture, processor)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(_entries(cache)) == 8
    cache.read(_tiles(mixture, processor))
    assert not list(cache.folder.rglob(".tmp-*"))


def test_data_workers_read_it(cache: FeatureCache, filled: Any, processor: AnchorFormerProcessor) -> None:
    Stage, Hardware = namedtuple("Stage", "global_batch epochs max_steps"), namedtuple("Hardware", "micro_batch")
    Run = namedtuple("Run", "data stage hardware seed")
    run = Run(filled.config(num_workers=1), Stage(4, 1.0, None), Hardware(4), 3)
    _fill(cache, Mixture(run.data, processor), processor, num_workers=1)
    alone = Run(replace(run.data, num_workers=0), *run[1:])
    for ours, theirs in zip(
        Loader(run, processor, 0, 1, features=cache), Loader(alone, processor, 0, 1, features=cache), strict=True
    ):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.features.tokens_BNV, other.features.tokens_BNV)
            assert one.features.tokens_BNV.shape[0] == one.tiles_B3HW.shape[0]


@pytest.mark.parametrize("select", ["tile", "image"])
@torch.no_grad()
def test_tiles_of_one_image_are_entries_of_their_own(
    select: str, mixture: Mixture, assemble_tiny: Any, tmp_path: Path
) -> None:
    tiled = assemble_tiny(tiling={"grids": [[2, 1], [1, 3]], "select": select})
    processor = AnchorFormerProcessor.from_pretrained(tiled)
    cache = FeatureCache(tmp_path / "features", tiled, torch.float32, CPU)
    _fill(cache, mixture, processor)
    image = open_image(mixture[0].images[0].path or b"")
    asked = processor(image, conversations=[[("user", "<image>what?")]])
    model = load_model(tiled, torch.float32).eval()
    live = model(**asked).logits
    model.vision_tower.forward = lambda *_: pytest.fail("the tower ran")
    cached = model(**asked, vision_features=cache.read(asked["pixel_values"])).logits
    torch.testing.assert_close(cached, live, rtol=0, atol=2e-6)
