"""Causal attention of one language model layer over one rank's samples on one card, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from anchorformer.kernels.attention import attend_flat
from bench.gpu.session import Columns, Session, relative_error
from bench.gpu.shapes import LONGEST, made_in, read_lengths
from bench.gpu.timing import measure

SAMPLES = 16
Run = Callable[[Tensor, Tensor, Tensor], Tensor]
Heads = list[tuple[Tensor, ...]]
"""Sets of queries, keys and values, each (rows, H, positions, K)."""


@dataclass(frozen=True)
class Row:
    """Samples end to end, and the ways to keep them apart; all take (1, H, S, K) and give (1, S, H, K)."""

    lengths: list[int]
    device: torch.device

    @property
    def borders(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).to(self.device, torch.int32)

    @property
    def sample_S(self) -> Tensor:
        """Which sample a position belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths)).to(self.device)

    def packed(self) -> Run:
        """As the library chooses on this machine."""
        borders, longest = self.borders, max(self.lengths)

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            scaling = query.shape[-1] ** -0.5
            return attend_flat(query, key, value, scale=scaling, cu_seqlens=borders, max_seqlen=longest)

        return run

    def rectangle(self) -> Run:
        """Copied into a padded rectangle and back."""
        shape = (len(self.lengths), max(self.lengths))
        where = torch.arange(sum(self.lengths), device=self.device)
        place_S = self.sample_S * shape[1] + where - self.borders[self.sample_S].long()

        def spread(x_1HSK: Tensor) -> Tensor:
            x_SHK = x_1HSK[0].transpose(0, 1)
            cells = x_SHK.new_zeros(shape[0] * shape[1], *x_SHK.shape[1:]).index_copy(0, place_S, x_SHK)
            return cells.unflatten(0, shape).transpose(1, 2)

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = _causal(spread(query), spread(key), spread(value))
            return out.flatten(0, 1).index_select(0, place_S).unsqueeze(0)

        return run

    def dense_mask(self) -> Run:
        """One S x S mask."""
        where = torch.arange(sum(self.lengths), device=self.device)
        mask_SS = (self.sample_S[:, None] == self.sample_S) & (where[:, None] >= where)
        return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, mask_SS).transpose(1, 2)


def text_attention(session: Session) -> None:
    """The samples of each distribution; `padded` is a rectangle from the start, with nothing copied."""
    scale = session.scale
    heads = scale.text["num_attention_heads"]
    width = scale.text["hidden_size"] // heads
    for name, found in read_lengths(session.lengths, tiny=session.tiny)[2].items():
        row = Row([min(length.positions(scale.num_anchors), LONGEST) for length in found[:SAMPLES]], scale.device)
        total, longest = sum(row.lengths), max(row.lengths)
        with made_in(scale):
            flat = [_leaves(1, total, heads, width) for _ in range(2)]
            padded = [_leaves(len(row.lengths), longest, heads, width) for _ in range(2)]
        with torch.no_grad():
            reference = row.dense_mask()(*(x.float() for x in flat[0]))
        variants: dict[str, tuple[Run, Heads]] = {
            "packed": (row.packed(), flat), "rectangle": (row.rectangle(), flat),
            "dense mask": (row.dense_mask(), flat), "padded": (_causal, padded),
        }  # fmt: skip
        for variant, (run, inputs) in variants.items():
            labels = {
                "what": "text attention", "variant": variant, "lengths": name, "samples": len(row.lengths),
                "positions": total, "longest": longest,
            }  # fmt: skip
            expected = reference if inputs is flat else None
            session.row(labels, 3, partial(_row, session, run, inputs, expected))


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def _leaves(rows: int, positions: int, heads: int, width: int) -> tuple[Tensor, ...]:
    """Query, key and value, laid out as a projection leaves them."""
    return tuple(torch.randn(rows, positions, heads, width).transpose(1, 2).requires_grad_() for _ in range(3))


def _train(run: Run, query: Tensor, key: Tensor, value: Tensor) -> None:
    out = run(query, key, value)
    torch.autograd.grad(out, (query, key, value), grad_outputs=out.detach())


def _row(session: Session, run: Run, inputs: Heads, reference: Tensor | None) -> Columns:
    with torch.no_grad():
        error = None if reference is None else relative_error(run(*inputs[0]), reference)
    return {**measure(partial(_train, run), inputs, session.scale.device).columns(), "error": error}
