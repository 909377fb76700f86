"""Anchor selection against the published code's own choices: indices exact, queries bit-exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anchorformer.contracts import VisionFeatures
from anchorformer.errors import UserError
from anchorformer.selectors.anchor import AnchorSelectorConfig
from anchorformer.selectors.average import AverageSelectorConfig
from anchorformer.selectors.fastervlm import FasterVlmSelectorConfig
from anchorformer.selectors.mean_pool import MeanPoolSelectorConfig


def test_every_selection_case(golden_root: Path) -> None:
    """Where heads do not divide the requested count, the published code returns fewer anchors without a word; here the
    request is refused and the published result belongs to the number it really has. Fewer anchors than heads make it
    return every token; that is refused too, and no valid number gives such a result, so there is none to compare.
    """
    tensors = load_file(golden_root / "selection/selection.safetensors")
    for case in json.loads((golden_root / "selection/cases.json").read_text()):
        name, heads, tokens = case["case"], case["H"], case["N_plus_1"]
        scores = tensors[f"{name}.attn"]
        row = scores[:, :, 0] if case["full_matrix"] else scores
        features = VisionFeatures(tensors[f"{name}.hidden"], row, True)
        if case["count"] % heads:
            with pytest.raises(UserError, match="num_anchors"):
                AnchorSelectorConfig(num_anchors=case["count"] + 1).count(tokens, heads, True)
        if case["count"] < heads:
            continue
        real_number = 1 + heads * (case["count"] // heads)
        anchors = AnchorSelectorConfig(num_anchors=real_number).build(tokens, heads, True)(features)
        assert anchors.indices_BT is not None
        assert torch.equal(anchors.indices_BT, tensors[f"{name}.indices"]), name
        assert torch.equal(anchors.tokens_BTV, tensors[f"{name}.queries"]), name


def test_one_head_is_where_the_joint_rankings_meet_the_published_one(golden_root: Path) -> None:
    """`average` and `fastervlm` have no vectors of their own; of one head they are the published rule."""
    tensors = load_file(golden_root / "selection/selection.safetensors")
    name = "onehead_H1_N26_T10"
    row_BLN, published = tensors[f"{name}.attn"].mean(1, keepdim=True), tensors[f"{name}.indices"]
    features = VisionFeatures(tensors[f"{name}.hidden"], None, True, cls_attention_BLN=row_BLN)
    average = AverageSelectorConfig(num_anchors=10).build(26, 1, True)(features)
    fastervlm = FasterVlmSelectorConfig(num_anchors=9).build(26, 1, True)(features)
    assert average.indices_BT is not None
    assert fastervlm.indices_BT is not None
    assert torch.equal(average.indices_BT, published)
    assert torch.equal(fastervlm.indices_BT, published[:, 1:])


def test_mean_pool_queries(golden_root: Path) -> None:
    tensors = load_file(golden_root / "selection/meanpool.safetensors")
    hidden = tensors["hidden"]
    anchors = MeanPoolSelectorConfig().build(hidden.shape[1], 16, True)(VisionFeatures(hidden, None, True))
    assert anchors.indices_BT is None
    # fp32 and fp64 of the published computation differ by 1.2e-7.
    torch.testing.assert_close(anchors.tokens_BTV, tensors["queries"], atol=1e-6, rtol=0)
