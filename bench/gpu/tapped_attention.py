"""Attention of the tapped block with its [CLS] row on one card: eager, SDPA and the row kernel, both in one pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from anchorformer.kernels import vision_attention_triton
from anchorformer.kernels.cls_row import cls_row
from anchorformer.kernels.vision_attention import attend_with_cls_row
from bench.gpu.session import Columns, Session, relative_error
from bench.gpu.shapes import made_in
from bench.gpu.timing import measure

Attention = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor | None]]


def tapped_attention(session: Session) -> None:
    """Output (B, N, H, K) and row (B, H, N) against fp32, at the tower's head width."""
    scale = session.scale
    heads = scale.vision["num_attention_heads"]
    width = scale.vision["hidden_size"] // heads
    variants: dict[str, Attention] = {
        "eager": _eager, "sdpa, no row": _sdpa, "sdpa + row": _sdpa_and_row, "as chosen": attend_with_cls_row,
    }  # fmt: skip
    if not session.tiny:
        # The kernel itself, whatever the library chooses: its choice is made from this row.
        variants["one pass"] = vision_attention_triton.launch
    for _, tokens, batch in scale.vision_batches:
        with made_in(scale):
            inputs = [
                (*(torch.randn(batch, tokens, heads, width).transpose(1, 2) for _ in range(3)), width**-0.5)
                for _ in range(2)
            ]
        query, key, value, scaling = inputs[0]
        reference, _ = _eager(query.float(), key.float(), value.float(), scaling)
        row_BHN = (query[:, :, :1].float() * key.float()).sum(-1) * scaling
        for variant, run in variants.items():
            labels = {"what": "tapped attention", "variant": variant, "tokens": tokens, "batch": batch}
            session.row(labels, 3, partial(_row, session, run, inputs, reference, row_BHN))


def _eager(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor | None]:
    weights = (query @ key.transpose(2, 3) * scaling).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor | None]:
    return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2).contiguous(), None


def _sdpa_and_row(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor | None]:
    return _sdpa(query, key, value, scaling)[0], cls_row(query, key, scaling)


def _row(
    session: Session,
    run: Attention,
    inputs: list[tuple[Tensor, Tensor, Tensor, float]],
    reference: Tensor,
    row_BHN: Tensor,
) -> Columns:
    out, row = run(*inputs[0])
    columns = measure(run, inputs, session.scale.device).columns()
    row_error = None if row is None else relative_error(row, row_BHN)
    return {**columns, "error": relative_error(out, reference), "row_error": row_error}
