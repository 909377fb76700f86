"""`python -m evals.agreement` on tiny weights: the two tables, what they must hold, and who is left out and why."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anchorformer.errors import UserError
from anchorformer.selectors.pca import PcaSelectorConfig
from anchorformer.selectors.vtc_cls import VtcClsSelectorConfig
from data.record import ImageRef, Record
from evals.agreement.__main__ import compose_config, main
from evals.agreement.config import choosing
from evals.agreement.overlaps import _chosen, _overlap, between_selectors, spread
from evals.agreement.rules import open_eye

SIMILARITY = {"_target_": "anchorformer.selectors.cls_similarity.ClsSimilaritySelectorConfig", "num_anchors": 9}
IMAGES, RECORDS = 5, 9


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine records on five images, one of them without any."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(generator.integers(0, 255, (28, 28, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "noise"}]
    records = [{"id": str(n), "image": f"{n % IMAGES}.png", "conversations": turns} for n in range(RECORDS - 1)]
    blind = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "noise"}]
    (folder / "captions.json").write_text(json.dumps([*records, {"id": "blind", "conversations": blind}]))
    return folder


@pytest.fixture(scope="module")
def compare(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    def run(model: Path, *overrides: str) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("agreement")
        sys.argv = [
            "agreement", f"model={model}", "data=llava_558k", f"data.root={photographs}",
            f"data.cache_dir={out}/cache", "data.sources.llava_558k.annotations=captions.json",
            "data.sources.llava_558k.images=.", f"out={out}", "batch_size=2", *overrides,
        ]  # fmt: skip
        assert main() == 0
        found: dict[str, Any] = json.loads((out / "agreement.json").read_text()) | {
            "text": (out / "agreement.md").read_text()
        }
        return found

    return run


def test_selectors_and_layers_are_compared_on_different_images(
    compare: Callable[..., dict[str, Any]], assemble_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    found = compare(assemble_tiny(SIMILARITY), "selectors=[anchor,average,fastervlm,pca,cls_similarity,random]")
    assert (found["images"], found["patches"], found["of_patches"], found["layer"]) == (IMAGES, 8, 16, 2)
    assert found["left_out"] == {}
    selectors, layers = found["selectors"], found["layers"]
    assert selectors["names"] == ["anchor", "average", "fastervlm", "pca", "cls_similarity", "random"]
    assert layers["names"] == ["1", "2", "3"]
    for table in (selectors, layers):
        share, jaccard = torch.tensor(table["share"]), torch.tensor(table["jaccard"])
        assert torch.equal(share, share.T)
        assert (share.diagonal() == 1).all()
        assert (jaccard <= share).all()
        assert share.min() >= 0
    # The two differ in [CLS] alone.
    assert selectors["share"][1] == selectors["share"][2]
    assert selectors["share"][0][5] < 1
    assert f"on {IMAGES} images" in found["text"]
    assert "tiles" not in found["text"]
    assert "share 0.500 on average" in found["text"]


@pytest.mark.parametrize(("sizes", "wanted"), [((199,), 100), ((100, 99), 100), ((299,), 100), ((7, 50, 3), 20)])
def test_images_are_spread_evenly_over_all_records(sizes: tuple[int, ...], wanted: int) -> None:
    sources = [pictured(*(f"{number}/{record}" for record in range(size))) for number, size in enumerate(sizes)]
    order = [record.images[0] for source in sources for record in source]
    places = [order.index(ref) for ref in spread(sources, wanted)]
    step = sum(sizes) / wanted
    assert [abs(place - number * step) < 1 for number, place in enumerate(places)] == [True] * wanted


def test_records_without_an_image_of_their_own_are_made_up_for() -> None:
    source = pictured("a", "a", None, "b", "b", "c", None, None, "c", "d", "e", "f")
    assert names(spread([source], 4)) == ["a", "b", "c", "d"]
    assert sorted(names(spread([source], 6))) == sorted(names(spread([source], 99))) == list("abcdef")
    assert len(spread([source], 5)) == 5
    with pytest.raises(UserError, match="no images to look at"):
        spread([pictured(None)], 4)


def pictured(*pictures: str | None) -> Any:
    """A source of records with these images."""
    refs = [() if name is None else (ImageRef(path=Path(name)),) for name in pictures]
    return [Record(str(number), images, ()) for number, images in enumerate(refs)]


def names(images: list[ImageRef]) -> list[str]:
    return [str(ref.path) for ref in images]


def test_a_tower_that_was_cut_says_who_cannot_look_through_it(
    compare: Callable[..., dict[str, Any]], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    found = compare(tiny_folder, "selectors=[anchor,cls_similarity]", "patches=4", "images=2", "layers=2")
    assert found["images"] == 2
    assert list(found["left_out"]) == ["cls_similarity"]
    assert "selector=cls_similarity" in found["text"]
    assert found["layers"]["names"] == ["1", "2"]


def test_every_selector_that_is_offered_chooses_patches_and_a_tiled_model_is_said_to_be_seen_whole(
    compare: Callable[..., dict[str, Any]], assemble_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A selector that merges has no indices to compare: it has to be named in `_MERGING`."""
    monkeypatch.setattr(sys, "argv", [])
    folder = assemble_tiny(SIMILARITY, tiling={"grids": [[2, 2]]})
    found = compare(folder, f"selectors=[{','.join(choosing())}]", "patches=4", "images=1", "layers=2")
    assert found["selectors"]["names"] == list(choosing())
    assert "one padded square" in found["text"]


def test_rules_that_add_up_other_layers_do_not_share_a_forward(
    photographs: Path, assemble_tiny: Callable[..., Path]
) -> None:
    eye, _ = open_eye(assemble_tiny(SIMILARITY))
    images = [ImageRef(path=photographs / f"{number}.png") for number in range(IMAGES)]
    rules: dict[str, Any] = {
        str(start): VtcClsSelectorConfig(layer=3, start_layer=start, num_anchors=6) for start in range(1, 4)
    } | {"pca": PcaSelectorConfig(layer=3, num_anchors=7)}
    alone = [
        torch.cat([_chosen(eye.build(rule), each) for each in eye.features(rule.needs, images, 2)])
        for rule in rules.values()
    ]
    assert not torch.equal(alone[0], alone[2]), "the layers choose alike here, so nothing is shown"
    assert between_selectors(eye, rules, images, 2) == _overlap(tuple(rules), torch.stack(alone))


def test_the_overlap_of_known_sets() -> None:
    chosen = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0]], [[1, 0, 1, 0], [0, 0, 1, 1]]]).bool()
    overlap = _overlap(("a", "b"), chosen)
    assert overlap.share == [[1.0, 0.25], [0.25, 1.0]]  # one of two in the first image, none in the second
    assert overlap.jaccard[0][1] == pytest.approx((1 / 3 + 0) / 2)


def test_every_selector_that_chooses_a_number_is_offered_and_others_are_refused() -> None:
    assert {"anchor", "average", "random"} <= set(choosing())
    assert {"all", "mean_pool", "anchor_tiny", "prumerge_plus", "visionzip"}.isdisjoint(choosing())
    given = ["model=m", "data=chartqa", "data.root=r"]
    assert set(compose_config(given).selectors) <= set(choosing())
    with pytest.raises(UserError, match="mean_pool"):
        compose_config([*given, "selectors=[anchor,mean_pool]"])


def test_a_model_whose_selector_has_no_number_needs_one(
    compare: Callable[..., dict[str, Any]], assemble_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(UserError, match="how many patches") as caught:
        compare(
            assemble_tiny(
                {"_target_": "anchorformer.selectors.all.AllSelectorConfig"},
                {"_target_": "anchorformer.connectors.mlp.MlpConfig"},
            )
        )
    assert "patches=" in caught.value.remedy
