"""The contract of selectors, for every YAML of conf/selector on towers with and without [CLS]."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from anchorformer.contracts import VisionFeatures
from anchorformer.errors import UserError
from anchorformer.schema import TARGET, parse_plugin
from anchorformer.selectors.average import AverageSelectorConfig
from anchorformer.selectors.base import PACKAGE, SelectorConfig, names_without_cls
from anchorformer.selectors.cls_similarity import ClsSimilaritySelectorConfig
from anchorformer.selectors.fastervlm import FasterVlmSelectorConfig
from anchorformer.selectors.mean_pool import MeanPoolSelectorConfig
from anchorformer.selectors.pca import PcaSelectorConfig
from anchorformer.selectors.random import RandomSelectorConfig
from anchorformer.selectors.received import ReceivedSelectorConfig
from anchorformer.selectors.uniform import UniformSelectorConfig, lattice
from anchorformer.selectors.vtc_cls import VtcClsSelectorConfig
from anchorformer.vision import image_key

FOLDER = Path(__file__).parents[2] / "conf" / "selector"
SIDE, HEADS, WIDTH, IMAGES, LAYERS = 8, 4, 12, 3, 3
SMALL = {"num_anchors": 17, "tau": 0.3}
"""T for a tower of 64 patches; the YAMLs are made for 576. Cosines of twelve numbers at random are small."""

PLACE_DECIDES = {"uniform", "random", "mean_pool"}
"""Selectors that go by where a patch lies; the others follow the patches when these are shuffled."""
MERGES = {"mean_pool", "prumerge_plus", "visionzip"}
RAGGED = {"correlation"}
"""Selectors of which images have different numbers of anchors: `count` is the largest, shorter rows repeat their last
one, the host waits for the numbers, and other images beside one change how long its row is. What holds in place of the
parts of the contract that say otherwise is in `test_correlation.py`."""


def _names() -> list[str]:
    return [path.stem for path in sorted(FOLDER.glob("*.yaml")) if "defaults" not in yaml.safe_load(path.read_text())]


FIXED = [name for name in _names() if name not in RAGGED]


def _config(name: str) -> SelectorConfig:
    spec: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    spec |= {key: value for key, value in SMALL.items() if key in spec}
    return parse_plugin(SelectorConfig, spec, PACKAGE, name)


def _features(has_cls: bool = True, seed: int = 0, ties: bool = False) -> VisionFeatures:
    generator = torch.Generator().manual_seed(seed)
    tokens = SIDE**2 + has_cls

    def draw(*shape: int) -> Tensor:
        values = torch.randn(IMAGES, *shape, generator=generator)
        return values.round() if ties else values

    return VisionFeatures(
        tokens_BNV=draw(tokens, WIDTH),
        cls_scores_BHN=draw(HEADS, tokens) if has_cls else None,
        has_cls=has_cls,
        cls_attention_BLN=draw(LAYERS, tokens) if has_cls else None,
        received_BN=draw(tokens),
        query_BLV=draw(2, WIDTH) if has_cls else None,
        keys_BLNV=draw(2, tokens, WIDTH),
        final_BNV=draw(tokens, WIDTH),
        image_key_B=torch.randint(2**32, (IMAGES,), generator=generator),
    )


def _reordered(features: VisionFeatures, order_N: Tensor) -> VisionFeatures:
    def at(x: Tensor | None, dim: int) -> Tensor | None:
        return None if x is None else x.index_select(dim, order_N)

    tokens = at(features.tokens_BNV, 1)
    assert tokens is not None
    return replace(
        features, tokens_BNV=tokens, cls_scores_BHN=at(features.cls_scores_BHN, 2),
        cls_attention_BLN=at(features.cls_attention_BLN, 2), received_BN=at(features.received_BN, 1),
        keys_BLNV=at(features.keys_BLNV, 2), final_BNV=at(features.final_BNV, 1),
    )  # fmt: skip


def _select(name: str, features: VisionFeatures) -> tuple[Tensor, Tensor | None]:
    anchors = _config(name).build(features.tokens_BNV.shape[1], HEADS, features.has_cls)(features)
    return anchors.tokens_BTV, anchors.indices_BT


def _indices(config: SelectorConfig, features: VisionFeatures) -> Tensor:
    indices = config.build(features.tokens_BNV.shape[1], HEADS, features.has_cls)(features).indices_BT
    assert indices is not None
    return indices


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("name", _names())
def test_the_contract(name: str, has_cls: bool) -> None:
    config, features = _config(name), _features(has_cls)
    num_tokens = features.tokens_BNV.shape[1]
    if config.needs_cls and not has_cls:
        with pytest.raises(UserError, match=r"\[CLS\]") as caught:
            config.build(num_tokens, HEADS, has_cls)
        assert all(repr(each) in caught.value.expected for each in names_without_cls())
        return
    tokens, indices = _select(name, features)
    assert config.ragged is (name in RAGGED)
    count = config.count(num_tokens, HEADS, has_cls)
    if name in RAGGED:
        assert tokens.shape[1] < count
        count = tokens.shape[1]
    assert tokens.shape == (IMAGES, count, WIDTH)
    if name in MERGES:
        assert indices is None
        return
    assert indices is not None
    assert indices.dtype is torch.int64
    assert indices.shape == (IMAGES, count)
    assert (indices.diff(dim=1) >= (name not in RAGGED)).all(), "ascending, so no duplicates"
    assert indices.min() >= 0
    assert indices.max() < num_tokens
    for image in range(IMAGES):
        assert torch.equal(tokens[image], features.tokens_BNV[image, indices[image]])


@pytest.mark.parametrize("name", _names())
def test_cls_is_kept_always_or_never(name: str) -> None:
    _, indices = _select(name, _features())
    if indices is not None:
        dropped = {"all", "fastervlm", "vtc_cls", "received", "correlation"}
        assert (indices[:, 0] != 0).all() if name in dropped else (indices[:, 0] == 0).all()


@pytest.mark.parametrize("name", _names())
def test_it_does_without_what_it_has_not_declared(name: str) -> None:
    features, needs = _features(), _config(name).needs
    bare = VisionFeatures(
        features.tokens_BNV,
        features.cls_scores_BHN if needs.cls_scores else None,
        True,
        cls_attention_BLN=None if needs.cls_attention_from is None else features.cls_attention_BLN,
        received_BN=features.received_BN if needs.received else None,
        query_BLV=features.query_BLV if needs.qk else None,
        keys_BLNV=features.keys_BLNV if needs.qk else None,
        final_BNV=features.final_BNV if needs.final else None,
        image_key_B=features.image_key_B if needs.image_key else None,
    )
    assert torch.equal(_select(name, bare)[0], _select(name, features)[0])
    if needs != SelectorConfig().needs:
        with pytest.raises(ValueError, match="needs"):
            _select(name, VisionFeatures(features.tokens_BNV, None, True))


@pytest.mark.parametrize("name", FIXED)
def test_images_do_not_mix_and_there_may_be_none(name: str) -> None:
    features = _features()

    def part(chosen: slice) -> VisionFeatures:
        return features.map(lambda x: x[chosen])

    together = _select(name, features)[0]
    torch.testing.assert_close(_select(name, part(slice(1, 2)))[0], together[1:2])
    assert _select(name, part(slice(0, 0)))[0].shape == (0, *together.shape[1:])


@pytest.mark.parametrize("name", FIXED)
def test_patches_that_are_shuffled_are_followed_where_the_rule_only_looks(name: str) -> None:
    features, generator = _features(), torch.Generator().manual_seed(9)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(SIDE**2, generator=generator) + 1])
    _, found = _select(name, features)
    _, shuffled = _select(name, _reordered(features, order))
    if found is None or shuffled is None:
        return
    followed = order[shuffled].sort(-1).values
    if name in PLACE_DECIDES:
        assert torch.equal(shuffled, found)
        assert not torch.equal(followed, found)
    else:
        assert torch.equal(followed, found)


@pytest.mark.parametrize("name", _names())
def test_tokens_in_half_precision_stay_what_they_are(name: str) -> None:
    features = _features()
    half = replace(features, tokens_BNV=features.tokens_BNV.bfloat16())
    tokens, _ = _select(name, half)
    assert tokens.dtype is torch.bfloat16


@pytest.mark.parametrize("name", _names())
def test_autocast_chooses_no_other_anchors(name: str) -> None:
    for features in [_features(seed=seed) for seed in range(5)]:
        exact, chosen = _select(name, features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens, indices = _select(name, features)
        assert torch.equal(tokens, exact)
        assert indices is None or torch.equal(indices, chosen)


@pytest.mark.parametrize("name", FIXED)
def test_it_is_one_graph_and_has_no_state(name: str) -> None:
    """No host synchronisation: a full graph would break on the first value read back."""
    features = _features()
    selector = _config(name).build(SIDE**2 + 1, HEADS, True)
    assert not selector.state_dict()
    torch._dynamo.reset()  # one compiled function per selector, not one that is compiled again for each
    compiled = torch.compile(lambda: selector(features).tokens_BTV, fullgraph=True, backend="eager")
    assert torch.equal(compiled(), selector(features).tokens_BTV)


RANKED = {
    "average": (AverageSelectorConfig, lambda f: f.cls_attention_BLN[:, -1]),
    "fastervlm": (FasterVlmSelectorConfig, lambda f: f.cls_attention_BLN[:, -1]),
    "vtc_cls": (VtcClsSelectorConfig, lambda f: f.cls_attention_BLN.sum(1)),
    "received": (ReceivedSelectorConfig, lambda f: f.received_BN),
}


@pytest.mark.parametrize("num_anchors", [2, 5, 17, 40, 64])
@pytest.mark.parametrize("name", RANKED)
def test_rankings_equal_a_slow_sort_whatever_the_ties(name: str, num_anchors: int) -> None:
    make, scores_of = RANKED[name]
    features = _features(ties=True)
    found = _indices(make(num_anchors=num_anchors), features).tolist()
    for row, scores in zip(found, scores_of(features).tolist(), strict=True):
        patches = num_anchors - (name == "average")
        ranking = sorted(range(1, SIDE**2 + 1), key=lambda i: (-scores[i], i))[:patches]
        assert row == sorted([0, *ranking] if name == "average" else ranking)


def test_vtc_cls_from_the_tapped_layer_alone_is_fastervlm() -> None:
    features = _features()
    assert features.cls_attention_BLN is not None
    last = VisionFeatures(
        features.tokens_BNV, None, True, cls_attention_BLN=features.cls_attention_BLN[:, -1:]
    )  # what a tower taps for start_layer = layer
    vtc = VtcClsSelectorConfig(start_layer=-2, num_anchors=16)
    assert vtc.needs == FasterVlmSelectorConfig(num_anchors=16).needs
    assert torch.equal(_indices(vtc, last), _indices(FasterVlmSelectorConfig(num_anchors=16), features))


def test_received_serves_a_tower_without_cls_by_the_same_ranking() -> None:
    features = _features(has_cls=False, ties=True)
    assert features.received_BN is not None
    found = _indices(ReceivedSelectorConfig(num_anchors=9), features).tolist()
    for row, scores in zip(found, features.received_BN.tolist(), strict=True):
        assert row == sorted(sorted(range(SIDE**2), key=lambda i: (-scores[i], i))[:9])


def test_cls_similarity_is_the_cosine_in_the_final_layer() -> None:
    features = _features()
    assert features.final_BNV is not None
    unit = features.final_BNV / features.final_BNV.norm(dim=-1, keepdim=True)
    best = (unit[:, 1:] @ unit[:, 0].unsqueeze(-1)).squeeze(-1).topk(8).indices.sort().values + 1
    assert torch.equal(_indices(ClsSimilaritySelectorConfig(num_anchors=9), features)[:, 1:], best)


def test_pca_equals_a_singular_value_decomposition_with_the_stated_signs() -> None:
    features = _features()
    for image, row in enumerate(_indices(PcaSelectorConfig(num_anchors=11), features)):
        patches = features.tokens_BNV[image, 1:].double()
        left, values, _ = torch.linalg.svd(patches - patches.mean(0), full_matrices=False)
        score = torch.zeros(SIDE**2, dtype=torch.float64)
        for component in (left * values).T[:3]:
            score += component if component.max() >= -component.min() else -component
        assert row.tolist() == [0, *(score.topk(10).indices.sort().values + 1).tolist()]


@pytest.mark.parametrize(("window", "count"), [(1, 65), (2, 17), (4, 5), (8, 2)])
def test_pooling_is_the_mean_of_each_square(window: int, count: int) -> None:
    features, config = _features(), MeanPoolSelectorConfig(window=window)
    tokens = config.build(SIDE**2 + 1, HEADS, True)(features).tokens_BTV
    assert tokens.shape[1] == count == config.count(SIDE**2 + 1, HEADS, True)
    grid = features.tokens_BNV[:, 1:].reshape(IMAGES, SIDE, SIDE, WIDTH)
    second = grid[:, :window, window : 2 * window] if window < SIDE else grid
    torch.testing.assert_close(tokens[:, 2 if window < SIDE else 1], second.mean((1, 2)))


def test_a_window_that_does_not_fit_is_refused_with_those_that_do() -> None:
    with pytest.raises(UserError, match="window=3") as caught:
        MeanPoolSelectorConfig(window=3).count(65, HEADS, True)
    assert "[1, 2, 4, 8]" in caught.value.expected


@pytest.mark.parametrize("side", [1, 4, 8, 9, 24])
def test_a_lattice_has_exactly_as_many_patches_as_asked_for(side: int) -> None:
    for count in range(1, side**2 + 1):
        found = lattice(count, side)
        assert found.shape == (count,)
        assert (found.diff() > 0).all()
        assert found[0] >= 0
        assert found[-1] < side**2


def test_a_square_lattice_is_a_regular_grid() -> None:
    rows = torch.arange(8) * 3 + 1
    assert torch.equal(lattice(64, 24), (rows[:, None] * 24 + rows).flatten())
    assert _indices(UniformSelectorConfig(num_anchors=17), _features()).unique(dim=0).shape[0] == 1


def test_random_patches_belong_to_the_image_and_the_seed() -> None:
    features = _features()
    first = _indices(RandomSelectorConfig(num_anchors=17), features)
    assert torch.equal(first, _indices(RandomSelectorConfig(num_anchors=17), _features()))
    assert first.unique(dim=0).shape[0] == IMAGES
    assert not torch.equal(first, _indices(RandomSelectorConfig(num_anchors=17, seed=1), features))
    fixed = _indices(RandomSelectorConfig(num_anchors=17, per_image=False), features)
    assert fixed.unique(dim=0).shape[0] == 1


def test_random_patches_are_spread_over_the_whole_image() -> None:
    keys = image_key(torch.randn(2000, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    tokens = torch.zeros(2000, SIDE**2, 1)
    features = VisionFeatures(tokens, None, False, image_key_B=keys)
    counts = _indices(RandomSelectorConfig(num_anchors=16), features).flatten().bincount(minlength=SIDE**2)
    # 2000 draws of 16 in 64: 500 each, standard deviation 19; five of them on either side.
    assert (counts - 500).abs().max() < 97


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_no_pixel_value_lies_where_rounding_could_change_the_key_of_its_image(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    """Of CLIP's, SigLIP's and DINOv2's normalisation: a few units in the last place cross no border of a level."""
    levels = (torch.arange(256, dtype=torch.float64) / 255 - torch.tensor(mean).double()[:, None]) * 32
    levels /= torch.tensor(std).double()[:, None]
    assert ((levels % 1) - 0.5).abs().min() > 1e-4
    assert 4 * levels.abs().max() * 2**-23 < 1e-4


@pytest.mark.parametrize("name", [name for name in _names() if "num_anchors" in (FOLDER / f"{name}.yaml").read_text()])
def test_more_anchors_than_patches_are_refused_with_a_number_that_fits(name: str) -> None:
    spec = yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) | {"num_anchors": 66}
    config = parse_plugin(SelectorConfig, spec, PACKAGE, name)
    with pytest.raises(UserError, match="num_anchors=66") as caught:
        config.count(SIDE**2 + 1, HEADS, True)
    fitting = int(caught.value.remedy.rpartition("=")[2])
    config = parse_plugin(SelectorConfig, spec | {"num_anchors": fitting}, PACKAGE, name)
    assert config.count(SIDE**2 + 1, HEADS, True) == fitting


def test_every_yaml_names_its_own_file() -> None:
    for name in _names():
        target = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())[TARGET]
        assert target.split(".")[-2] == name
