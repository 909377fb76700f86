"""Anchor selection: Python loops over images and heads, against tensor operations that never leave the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from anchorformer.kernels.selection import select_anchors
from bench.published import selection as published
from bench.runner import Row, Size, cpu_seconds

GOALS = {(145, "independent"): 6.0, (145, "agreeing"): 25.0}
"""How many times faster, by anchors and by what the heads look at."""


def rows(size: Size) -> Iterator[Row]:
    batch, heads, tokens = (2, 4, 50) if size is Size.tiny else (8, 16, 577)
    for anchors in (9, 17) if size is Size.tiny else (65, 145, 257):
        for kind in ("independent", "agreeing"):
            yield _row(scores(kind, batch, heads, tokens), anchors, kind, size)


def scores(kind: str, batch: int, heads: int, tokens: int) -> Tensor:
    """Random [CLS] scores (B, H, N).

    Args:
        kind: `independent` heads, or `agreeing` ones, which rank alike but for 3 % noise, so that every head has to
            look past what the heads before it have taken.
    """
    torch.manual_seed(0)
    noise = torch.randn(batch, heads, tokens)
    return noise if kind == "independent" else torch.randn(batch, 1, tokens) + 0.03 * noise


def _row(scores_BHN: Tensor, anchors: int, kind: str, size: Size) -> Row:
    old = torch.tensor(published.select(scores_BHN, anchors))
    new = select_anchors(scores_BHN, anchors)
    seconds = cpu_seconds(
        {"old": lambda: published.select(scores_BHN, anchors), "new": lambda: select_anchors(scores_BHN, anchors)},
        repeats=2 if size is Size.tiny else 10,
    )
    images = len(scores_BHN)
    return Row(
        name=f"selection, T={anchors}, {kind} heads", unit="ms/image",
        old=seconds["old"] / images * 1e3, new=seconds["new"] / images * 1e3, equal=torch.equal(old, new),
        goal_ratio=GOALS.get((anchors, kind)), note="equal: identical anchors in identical order",
    )  # fmt: skip
