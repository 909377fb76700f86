"""The language model's head: logits of every position in fp32, against logits of supervised positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from anchorformer.contracts import IGNORE_INDEX
from anchorformer.kernels.cross_entropy import cross_entropy_sum
from bench.published import head as published
from bench.runner import Row, Size, as_accurate, cpu_seconds, error, saved_bytes

SUPERVISED = 0.1
GOAL = 3.0


def rows(size: Size) -> Iterator[Row]:
    width, vocabulary, positions = (64, 200, 60) if size is Size.tiny else (4096, 32000, 320)
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(1, positions, width)
    labels = torch.full((1, positions), IGNORE_INDEX)
    targets = torch.randperm(positions - 1)[: int(positions * SUPERVISED)].sort().values + 1
    labels[0, targets] = torch.randint(0, vocabulary, (len(targets),))
    index = targets - 1  # the collator's predict_index_Q

    def old(x: Tensor) -> Tensor:
        return published.loss(x, head, labels)

    def new(x: Tensor) -> Tensor:
        return cross_entropy_sum(head(x[:, index])[0], labels[0, targets]) / len(targets)

    reference, reference_grad = _step(old, hidden)
    exact, exact_grad = _step(new, hidden)
    same = abs(float(exact - reference)) < 1e-5 * float(reference) and error(exact_grad, reference_grad) < 1e-5
    head.bfloat16()
    hidden = hidden.bfloat16()
    (old_loss, old_grad), (new_loss, new_grad) = _step(old, hidden), _step(new, hidden)
    equal = same and as_accurate(new_loss, old_loss, reference) and as_accurate(new_grad, old_grad, reference_grad)
    note = (
        "frozen head, forward and backward; equal: loss and gradient to 1e-5 in fp32, and in bf16 at most twice as far "
        "from fp32 as the published ones"
    )
    seconds = cpu_seconds({"old": lambda: _step(old, hidden), "new": lambda: _step(new, hidden)}, repeats=3)
    where = f"head, {SUPERVISED:.0%} of {positions} positions supervised, bf16"
    yield Row(
        name=f"{where}: time", unit="ms", old=seconds["old"] * 1e3, new=seconds["new"] * 1e3, equal=equal,
        goal_ratio=None if size is Size.tiny else GOAL, note=note,
    )  # fmt: skip
    besides = [hidden, *head.parameters()]
    old_bytes, _ = saved_bytes(lambda: old(hidden.requires_grad_()), besides)
    new_bytes, _ = saved_bytes(lambda: new(hidden.requires_grad_()), besides)
    yield Row(name=f"{where}: saved bytes", unit="MB", old=old_bytes / 1e6, new=new_bytes / 1e6, equal=equal, note=note)


def _step(loss: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden.detach().requires_grad_()
    value = loss(x)
    (grad,) = torch.autograd.grad(value, x)
    return value.detach(), grad
