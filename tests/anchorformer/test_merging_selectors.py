"""PruMerge+ and VisionZip against loops that say the same plainly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anchorformer.contracts import VisionFeatures, VisionNeeds
from anchorformer.errors import UserError
from anchorformer.selectors.prumerge_plus import PruMergePlusSelectorConfig
from anchorformer.selectors.visionzip import VisionZipSelectorConfig
from anchorformer.tiling import Select, Tiling
from anchorformer.views import build_selector, join_tiles

PATCHES, HEADS, WIDTH, IMAGES = 36, 2, 8, 3


def features_of(*, has_cls: bool = True, seed: int = 0, ties: bool = False) -> VisionFeatures:
    generator = torch.Generator().manual_seed(seed)
    tokens = PATCHES + has_cls

    def draw(*shape: int) -> Tensor:
        values = torch.randn(IMAGES, *shape, generator=generator)
        return values.round() if ties else values

    return VisionFeatures(
        tokens_BNV=draw(tokens, WIDTH), cls_scores_BHN=None, has_cls=has_cls,
        cls_attention_BLN=draw(1, tokens) if has_cls else None, received_BN=draw(tokens),
        query_BLV=draw(1, WIDTH) if has_cls else None, keys_BLNV=draw(1, tokens, WIDTH),
    )  # fmt: skip


def tokens_of(config: Any, features: VisionFeatures) -> Tensor:
    found: Tensor = config.build(features.tokens_BNV.shape[1], HEADS, features.has_cls)(features).tokens_BTV
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def published_union(attention_P: list[float], top_k: int, spacing: int) -> set[int]:
    """What the released code of PruMerge+ keeps: the `top_k` most attended patches, and the lattice."""
    best = sorted(range(PATCHES), key=lambda i: (-attention_P[i], i))[:top_k]
    return {*best} | {*range(0, PATCHES - 1, spacing)}


def prumerge_plus(features: VisionFeatures, image: int, top_k: int, spacing: int, neighbours: int) -> Tensor:
    """(T, V) in double precision, T being whatever comes of `top_k`."""
    assert features.query_BLV is not None
    assert features.keys_BLNV is not None
    tokens = features.tokens_BNV[image].double()
    query, keys = features.query_BLV[image, 0].double(), features.keys_BLNV[image, 0].double()
    attention = (keys @ query / WIDTH**0.5).softmax(0)[1:].tolist()
    tokens, keys = tokens[1:], keys[1:]
    kept = sorted(published_union(attention, top_k, spacing))
    out = []
    for own in kept:
        others = sorted((i for i in range(PATCHES) if i != own), key=lambda i: -cosine(keys[own], keys[i]))
        out.append(tokens[own] + sum(attention[i] * tokens[i] for i in others[:neighbours]))
    dropped = [i for i in range(PATCHES) if i not in kept]
    out.append(sum((attention[i] * tokens[i] for i in dropped), torch.zeros(WIDTH, dtype=torch.float64)))
    return torch.stack(out)


@pytest.mark.parametrize(("top_k", "spacing", "neighbours"), [(4, 6, 5), (9, 3, 1), (1, 36, 35), (12, 5, 20)])
def test_prumerge_plus_is_the_published_rule_at_the_number_of_tokens_that_it_gives(
    top_k: int, spacing: int, neighbours: int
) -> None:
    features = features_of(seed=top_k)
    for image in range(IMAGES):
        expected = prumerge_plus(features, image, top_k, spacing, neighbours)
        config = PruMergePlusSelectorConfig(num_anchors=len(expected), spacing=spacing, neighbours=neighbours)
        found = tokens_of(config, features)[image]
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_prumerge_plus_reads_the_last_block_and_the_tokens_of_its_layer() -> None:
    assert PruMergePlusSelectorConfig().needs == VisionNeeds(layer=-2, qk=(-1,))
    assert PruMergePlusSelectorConfig(layer=3, attention_layer=3).needs == VisionNeeds(layer=3, qk=(3,))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_anchors": 6}, "7 to 36"), ({"num_anchors": 37}, "7 to 36"), ({"neighbours": 36}, "1 to 35"),
        ({"spacing": 1}, "36 to 36"),
    ],
)  # fmt: skip
def test_prumerge_plus_says_what_fits(change: dict[str, int], words: str) -> None:
    config = replace(PruMergePlusSelectorConfig(num_anchors=9, spacing=6, neighbours=4), **change)
    with pytest.raises(UserError, match=words):
        config.build(PATCHES + 1, HEADS, True)


def visionzip(features: VisionFeatures, image: int, dominant: int, contextual: int, *, received: bool) -> Tensor:
    """(T, V) in double precision; `dominant` without [CLS]."""
    cls = int(features.has_cls)
    row = features.received_BN if received else features.cls_attention_BLN
    assert row is not None
    assert features.keys_BLNV is not None
    scores = row[image].flatten().tolist()
    tokens = features.tokens_BNV[image].double()
    keys = features.keys_BLNV[image, 0].double().view(-1, HEADS, WIDTH // HEADS).mean(1)
    ranked = sorted(range(cls, len(tokens)), key=lambda i: (-scores[i], i))
    kept = [*range(cls), *sorted(ranked[:dominant])]
    rest = sorted(ranked[dominant:])
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    groups: dict[int, list[int]] = {target: [] for target in targets}
    for other in (i for i in rest if i not in groups):
        groups[max(targets, key=lambda target: cosine(keys[target], keys[other]))].append(other)
    out = [tokens[i] for i in kept]
    for target, members in groups.items():
        out.append(tokens[target] + (tokens[members].mean(0) if members else 0))
    return torch.stack(out)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("has_cls", "received"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize(("others", "share", "contextual"), [(16, 0.15625, 2), (12, 0.5, 6), (2, 0.9, 1), (36, 0.1, 4)])
def test_visionzip_is_a_loop_over_groups(
    others: int, share: float, contextual: int, has_cls: bool, received: bool, ties: bool
) -> None:
    features = features_of(has_cls=has_cls, seed=others)
    if ties:  # of the ranking: keys that are equally near would leave open where a patch goes
        features = replace(
            features, cls_attention_BLN=None if not has_cls else features.cls_attention_BLN.round(),  # type: ignore[union-attr]
            received_BN=features.received_BN.round(),  # type: ignore[union-attr]
        )  # fmt: skip
    config = VisionZipSelectorConfig(num_anchors=others + has_cls, contextual_share=share, received=received)
    found = tokens_of(config, features)
    for image in range(IMAGES):
        expected = visionzip(features, image, others - contextual, contextual, received=received)
        torch.testing.assert_close(found[image].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_anchors", "contextual"), [(65, 10), (129, 20), (193, 30)])
def test_visionzip_has_the_published_numbers(num_anchors: int, contextual: int) -> None:
    selector = VisionZipSelectorConfig(num_anchors=num_anchors).build(577, 16, True)
    assert (selector.num_contextual, selector.num_anchors) == (contextual, num_anchors - contextual)


def test_visionzip_serves_a_tower_without_cls_where_it_is_told_so() -> None:
    with pytest.raises(UserError, match=r"\[CLS\]"):
        VisionZipSelectorConfig(num_anchors=9).build(PATCHES, HEADS, False)
    config = VisionZipSelectorConfig(num_anchors=9, received=True)
    assert config.needs == VisionNeeds(layer=-2, received=True, qk=(-2,))
    assert not config.needs_cls
    assert tokens_of(config, features_of(has_cls=False)).shape == (IMAGES, 9, WIDTH)
    with pytest.raises(UserError, match="too few"):
        VisionZipSelectorConfig(num_anchors=2).build(PATCHES + 1, HEADS, True)


def test_visionzip_gives_an_image_of_any_number_of_tiles_the_same_tokens_in_any_batch() -> None:
    tiling = Tiling(grids=((1, 1), (2, 1)), overview=False, select=Select.image)
    selector = build_selector(tiling, VisionZipSelectorConfig(num_anchors=20), PATCHES + 1, HEADS, True)
    features = features_of()
    together = selector(join_tiles(features, [1, 2]))
    assert together.indices_BT is None
    assert together.tokens_BTV.shape == (2, 20, WIDTH)
    for row, (tiles, count) in enumerate(((slice(0, 1), 1), (slice(1, 3), 2))):
        own = {name: value[tiles] for name, value in vars(features).items() if isinstance(value, Tensor)}
        alone = selector(join_tiles(VisionFeatures(has_cls=True, cls_scores_BHN=None, **own), [count]))
        assert torch.equal(alone.tokens_BTV[0], together.tokens_BTV[row])
