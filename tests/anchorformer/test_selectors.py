"""Selectors: the anchor rule against a slow loop, ties, low precision, every valid count, and refusals that help."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anchorformer.contracts import VisionFeatures
from anchorformer.errors import UserError
from anchorformer.selectors.all import AllSelectorConfig
from anchorformer.selectors.anchor import AnchorSelectorConfig, select_anchors
from anchorformer.selectors.base import names_without_cls


def _slow_anchors(scores_BHN: Tensor, num_anchors: int) -> list[list[int]]:
    """The rule word by word: heads in order, each walks down its ranking and adds what is not yet chosen."""
    per_head = (num_anchors - 1) // scores_BHN.shape[1]
    result = []
    for heads in scores_BHN.float().tolist():
        chosen = {0}
        for scores in heads:
            ranking = sorted(range(1, len(scores)), key=lambda i: (-scores[i], i))
            chosen.update([i for i in ranking if i not in chosen][:per_head])
        result.append(sorted(chosen))
    return result


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Tensor, int]:
    heads, patches = draw(st.integers(1, 6)), draw(st.integers(6, 30))
    per_head = draw(st.integers(1, patches // heads))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(draw(st.integers(1, 3)), heads, patches + 1, generator=generator)
    kinds = ["distinct", "ties", "all equal", "agreeing heads", "bf16", "signed zeros", "infinite"]
    kind = draw(st.sampled_from(kinds))
    if kind == "ties":
        scores = scores.round()
    elif kind == "all equal":
        scores = torch.zeros_like(scores)
    elif kind == "agreeing heads":
        scores = scores[:, :1].expand_as(scores)
    elif kind == "bf16":
        scores = scores.bfloat16()
    elif kind == "signed zeros":
        scores = torch.where(scores > 0, 0.0, -0.0)
    elif kind == "infinite":
        scores = torch.where(scores > 1, torch.inf, torch.where(scores < -1, -torch.inf, scores))
    return scores, 1 + heads * per_head


@settings(max_examples=150, deadline=None)
@given(case=_cases())
def test_anchors_equal_the_slow_loop(case: tuple[Tensor, int]) -> None:
    scores, num_anchors = case
    found = select_anchors(scores, num_anchors)
    assert found.dtype is torch.int64
    assert found.tolist() == _slow_anchors(scores, num_anchors)


@settings(max_examples=50, deadline=None)
@given(case=_cases())
def test_anchors_are_distinct_ascending_and_begin_with_cls(case: tuple[Tensor, int]) -> None:
    scores, num_anchors = case
    found = select_anchors(scores, num_anchors)
    assert found.shape == (scores.shape[0], num_anchors)
    assert (found[:, 0] == 0).all()
    assert (found.diff(dim=1) > 0).all()
    assert (found < scores.shape[2]).all()


def test_selection_follows_the_patches_when_they_are_shuffled() -> None:
    torch.manual_seed(0)
    scores, order = torch.randn(1, 4, 50), torch.randperm(49)
    shuffled = torch.cat([scores[..., :1], scores[..., 1:][..., order]], -1)
    back = {0} | {int(order[i - 1]) + 1 for i in select_anchors(shuffled, 17)[0].tolist() if i}
    assert back == set(select_anchors(scores, 17)[0].tolist())


@pytest.mark.parametrize(("num_tokens", "num_heads"), [(37, 4), (65, 4), (577, 16), (197, 12)])
def test_count_accepts_exactly_the_valid_numbers(num_tokens: int, num_heads: int) -> None:
    valid = set(range(1 + num_heads, num_tokens + 1, num_heads))
    for num_anchors in range(-1, num_tokens + 3):
        config = AnchorSelectorConfig(num_anchors=num_anchors)
        if num_anchors in valid:
            assert config.count(num_tokens, num_heads, True) == num_anchors
            continue
        with pytest.raises(UserError) as caught:
            config.build(num_tokens, num_heads, True)
        nearest = int(caught.value.remedy.rpartition("=")[2])
        assert abs(nearest - num_anchors) == min(abs(each - num_anchors) for each in valid)


def test_published_counts_fit_clip_l_336() -> None:
    assert [AnchorSelectorConfig(num_anchors=count).count(577, 16, True) for count in (65, 145, 257)] == [65, 145, 257]


def test_a_tower_with_fewer_patches_than_heads_has_no_valid_number() -> None:
    with pytest.raises(UserError, match="more patches"):
        AnchorSelectorConfig(num_anchors=5).count(5, 12, True)


def test_a_tower_without_cls_is_refused_and_the_valid_selectors_are_named() -> None:
    assert "all" in names_without_cls()
    assert "anchor" not in names_without_cls()
    with pytest.raises(UserError) as caught:
        AnchorSelectorConfig(num_anchors=17).count(65, 4, False)
    assert all(repr(name) in caught.value.expected for name in names_without_cls())


def _features(has_cls: bool = True) -> VisionFeatures:
    torch.manual_seed(1)
    return VisionFeatures(torch.randn(2, 37, 8), torch.randn(2, 4, 37) if has_cls else None, has_cls)


def test_anchor_tokens_are_a_pure_gather() -> None:
    features = _features()
    anchors = AnchorSelectorConfig(num_anchors=9).build(37, 4, True)(features)
    assert anchors.indices_BT is not None
    for tokens, chosen, all_tokens in zip(anchors.tokens_BTV, anchors.indices_BT, features.tokens_BNV, strict=True):
        assert torch.equal(tokens, all_tokens[chosen])


def test_anchor_selector_without_scores_says_whose_job_they_are() -> None:
    with pytest.raises(ValueError, match="needs"):
        AnchorSelectorConfig(num_anchors=9).build(37, 4, True)(_features(has_cls=False))


@pytest.mark.parametrize("has_cls", [True, False])
def test_all_keeps_every_patch_and_drops_cls(has_cls: bool) -> None:
    features = _features(has_cls)
    config = AllSelectorConfig()
    anchors = config.build(37, 4, has_cls)(features)
    assert anchors.tokens_BTV.shape[1] == config.count(37, 4, has_cls) == 37 - has_cls
    assert torch.equal(anchors.tokens_BTV, features.tokens_BNV[:, int(has_cls) :])
    assert anchors.indices_BT is not None
    assert anchors.indices_BT[1].tolist() == list(range(int(has_cls), 37))


def test_selectors_hold_no_state_and_run_as_one_graph() -> None:
    """No host synchronisation: a full graph would break on the first value read back."""
    selector = AnchorSelectorConfig(num_anchors=9).build(37, 4, True)
    assert not selector.state_dict()
    features = _features()
    compiled = torch.compile(lambda scores: select_anchors(scores, 9), fullgraph=True, backend="eager")
    assert features.cls_scores_BHN is not None
    assert torch.equal(compiled(features.cls_scores_BHN), select_anchors(features.cls_scores_BHN, 9))
    on_meta = select_anchors(features.cls_scores_BHN.to("meta"), 9)
    assert on_meta.shape == (2, 9)
