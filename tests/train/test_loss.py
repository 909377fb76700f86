"""The loss is a mean over the step's supervised tokens, however they are shared out."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from anchorformer.contracts import Batch
from train.loss import supervised_loss

VOCABULARY = 7


def batch_of(targets: torch.Tensor, positions: torch.Tensor) -> Batch:
    length = 40
    return Batch(
        input_ids_S=torch.zeros(length, dtype=torch.long), position_ids_S=torch.arange(length),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32), max_seqlen=length,
        tiles_B3HW=torch.zeros(0, 3, 2, 2, dtype=torch.uint8), predict_index_Q=positions, targets_Q=targets,
        sample_ids=("a",),
    )  # fmt: skip


class Table:
    """Stands for a model: the logits of a position are a row of a table."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.rows = torch.randn(40, VOCABULARY, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
        self.seen: dict[str, Any] = {}

    def __call__(self, logits_to_keep: torch.Tensor, **inputs: Any) -> Any:
        self.seen = inputs
        return SimpleNamespace(logits=self.rows[logits_to_keep][None])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=4))
def test_shares_add_up_to_the_mean(count: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(count)
    targets = torch.randint(0, VOCABULARY, (count,), generator=generator)
    positions = torch.randperm(40, generator=generator)[:count]
    borders = [0, *sorted(min(cut, count) for cut in cuts), count]

    whole, dealt = Table(), Table()
    F.cross_entropy(whole.rows[positions], targets).backward()
    shares = [
        supervised_loss(dealt, batch_of(targets[low:high], positions[low:high]), count)
        for low, high in pairwise(borders)
    ]
    total = torch.stack(shares).sum()
    total.backward()
    mean = F.cross_entropy(whole.rows[positions].detach(), targets)
    assert float(total.detach()) == pytest.approx(float(mean), rel=1e-6)
    torch.testing.assert_close(dealt.rows.grad, whole.rows.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("step_supervised", [0, 5])
def test_no_targets_give_zero_with_a_graph(step_supervised: int) -> None:
    nothing = torch.zeros(0, dtype=torch.long)
    model = Table()
    loss = supervised_loss(model, batch_of(nothing, nothing), step_supervised)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.count_nonzero(model.rows.grad) == 0


def test_low_precision_logits_are_summed_in_fp32() -> None:
    model = Table(torch.bfloat16)
    targets, positions = torch.randint(0, VOCABULARY, (40,)), torch.arange(40)
    loss = supervised_loss(model, batch_of(targets, positions), 40)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(model.rows.detach().float(), targets)), rel=1e-6)


def test_the_flat_form_is_used() -> None:
    model = Table()
    supervised_loss(model, batch_of(torch.tensor([1]), torch.tensor([4])), 1)
    assert model.seen["input_ids"].shape == model.seen["position_ids"].shape == (1, 40)
    assert "attention_mask" not in model.seen
    assert model.seen["cu_seqlens"].dtype == torch.int32
