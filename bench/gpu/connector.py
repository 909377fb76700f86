"""Forward and backward of the AnchorFormer connector on one card: einsum, ours, folded keys and values, compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from anchorformer.connectors.base import Connector
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.parts import parse_parts
from bench.gpu.session import Columns, Session, relative_error
from bench.gpu.shapes import Scale, made_in, parts_of
from bench.gpu.timing import measure
from bench.published.connector import PublishedConnector

BATCHES = (4, 32)
Inputs = list[tuple[Tensor, Tensor, Tensor]]
"""Anchors (B, T, V), visual tokens (B, N, V) and the gradient of the embeddings (B, T, D)."""


def connector(session: Session) -> None:
    """Every variant on the same weights; compared with our plain one."""
    scale = session.scale
    for _, tokens, _ in scale.vision_batches:
        for batch in BATCHES[:1] if session.tiny else BATCHES:
            with made_in(scale):
                ours, folded = _build(scale, fold_kv=False), _build(scale, fold_kv=True)
                folded.load_state_dict(ours.state_dict())
                inputs = [_draw(scale, batch, tokens) for _ in range(2)]
            variants: dict[str, nn.Module] = {
                "einsum": PublishedConnector(ours), "ours": ours, "ours, folded": folded,
                "ours, compiled": _compiled(ours, session), "ours, folded and compiled": _compiled(folded, session),
            }  # fmt: skip
            with torch.no_grad():
                reference = _forward(ours, *inputs[0][:2])
            for variant, module in variants.items():
                labels = {"what": "connector", "variant": variant, "tokens": tokens, "batch": batch}
                seconds = 30 if "compiled" in variant else 3
                session.row(labels, seconds, partial(_row, session, module, inputs, reference))
            torch.compiler.reset()


def _build(scale: Scale, *, fold_kv: bool) -> Connector:
    _, config = parse_parts(*parts_of("anchor_former", scale, fold_kv=fold_kv))
    connector = config.build(scale.vision["hidden_size"], scale.text["hidden_size"])
    for module in connector.modules():
        if isinstance(module, nn.LayerNorm):  # fresh norms would fold without any rounding
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)
    return connector


def _compiled(module: nn.Module, session: Session) -> nn.Module:
    compiled: nn.Module = torch.compile(module, fullgraph=True, backend=session.compiler)  # type: ignore[assignment]
    return compiled


def _draw(scale: Scale, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    media = torch.randn(batch, tokens, scale.vision["hidden_size"])
    gradient = torch.randn(batch, scale.num_anchors, scale.text["hidden_size"])
    return media[:, : scale.num_anchors].contiguous(), media, gradient


def _forward(module: Callable[..., Tensor], anchors: Tensor, tokens: Tensor) -> Tensor:
    return module(
        Anchors(tokens_BTV=anchors, indices_BT=None),
        VisionFeatures(tokens_BNV=tokens, cls_scores_BHN=None, has_cls=True),
    )


def _train(module: nn.Module, anchors: Tensor, tokens: Tensor, gradient: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    _forward(module, anchors, tokens).backward(gradient)


def _row(session: Session, module: nn.Module, inputs: Inputs, reference: Tensor) -> Columns:
    with torch.no_grad():
        error = relative_error(_forward(module, *inputs[0][:2]), reference)
    columns = measure(partial(_train, module), inputs, session.scale.device, seconds=0.3).columns()
    module.zero_grad(set_to_none=True)
    return {**columns, "error": error}
