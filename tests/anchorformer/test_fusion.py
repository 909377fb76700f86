"""Visual embeddings land at their placeholders in order, with their gradients, whatever the batch looks like."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorformer.errors import UserError
from anchorformer.fusion import fuse

IMAGE = 9


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3), st.booleans())
def test_equals_a_masked_scatter_with_gradients(places: list[list[bool]], half: bool) -> None:
    torch.manual_seed(0)
    mask = torch.tensor(places)
    ids = torch.where(mask, IMAGE, torch.randint(0, 9, mask.shape))
    embeds = torch.randn(*mask.shape, 4, requires_grad=True)
    visual = torch.randn(int(mask.sum()), 1, 4, dtype=torch.bfloat16 if half else None, requires_grad=True)
    found = fuse(embeds, ids, visual, IMAGE)
    expected = embeds.masked_scatter(mask[..., None], visual.float())
    assert torch.equal(found, expected)
    weights = torch.randn_like(found)
    leaves = (embeds, visual)
    mine = torch.autograd.grad((found * weights).sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    for gradient, wanted in zip(mine, theirs, strict=True):
        assert wanted.numel() == 0 if gradient is None else torch.equal(gradient, wanted)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_counts_that_differ_are_named(images: int) -> None:
    ids = torch.tensor([[1, IMAGE, IMAGE, 2]])
    with pytest.raises(UserError, match="2 placeholders"):
        fuse(torch.zeros(1, 4, 3), ids, torch.zeros(images, 1, 3), IMAGE)


@pytest.mark.gpu
def test_on_a_device_nothing_is_counted_by_the_host_while_training() -> None:
    ids = torch.tensor([[1, IMAGE, IMAGE, 2]], device="cuda")
    embeds = torch.zeros(1, 4, 3, device="cuda", requires_grad=True)
    visual = torch.ones(2, 1, 3, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fuse(embeds, ids, visual, IMAGE).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert embeds.grad is not None
    assert embeds.grad[0, :, 0].tolist() == [1, 0, 0, 1]
    with torch.no_grad(), pytest.raises(UserError, match="2 placeholders"):
        fuse(embeds, ids, visual[:1], IMAGE)
