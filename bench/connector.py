"""The connector: einsum attention with its scores, against fused attention, and with all keys and values folded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from anchorformer.connectors.anchor_former import AnchorFormerConnector, AnchorFormerConnectorConfig
from anchorformer.contracts import Anchors, VisionFeatures
from bench.published.connector import PublishedConnector
from bench.runner import Row, Size, as_accurate, cpu_seconds, error, saved_bytes

ANCHORS = 145
GOALS = {(577, False): 1.4, (2305, False): 1.8, (577, True): 1.65, (2305, True): 2.5}
"""Saved bytes: how many times fewer, by visual tokens and by whether keys and values are folded."""

EXACT = 5e-6
"""Relative error in fp32, gradients included."""


def rows(size: Size) -> Iterator[Row]:
    vision, text, shapes = (64, 96, [(2, 50)]) if size is Size.tiny else (1024, 4096, [(2, 577), (1, 2305)])
    anchors = 9 if size is Size.tiny else ANCHORS
    torch.manual_seed(0)
    ours = AnchorFormerConnectorConfig().build(vision, text)
    for batch, tokens in shapes:
        ours.float()
        media = torch.randn(batch, tokens, vision)
        yield from _shape(ours, media, anchors, size)


def _shape(ours: AnchorFormerConnector, media: Tensor, anchors: int, size: Size) -> Iterator[Row]:
    published = PublishedConnector(ours)

    def call(name: str, media_BNV: Tensor) -> Tensor:
        features = VisionFeatures(media_BNV, None, has_cls=True)
        queries = Anchors(media_BNV[:, :anchors], None)
        ours.fold_kv = name == "folded"
        return published(queries, features) if name == "published" else ours(queries, features)

    names = ("published", "fused", "folded")
    in_fp32 = {name: _step(call, name, media, ours) for name in names}
    ours.double()
    reference = _step(call, "published", media.double(), ours)
    ours.bfloat16()
    media = media.bfloat16()
    in_bf16 = {name: _step(call, name, media, ours) for name in names}
    besides = [media, *ours.parameters()]
    saved = {name: saved_bytes(partial(call, name, media), besides)[0] for name in names}
    seconds = {}
    if size is not Size.quick:
        seconds = cpu_seconds({name: partial(_step, call, name, media, ours) for name in names}, repeats=2)
    for name in names[1:]:
        equal = all(map(_exact, in_fp32[name], in_fp32["published"], reference))
        equal &= all(map(as_accurate, in_bf16[name], in_bf16["published"], reference))
        where = f"connector, {name}, N={media.shape[1]}, B={media.shape[0]}, bf16"
        note = (
            f"equal: output and all gradients in fp32 to {EXACT:g} of fp64 (output "
            f"{error(in_fp32[name][0], reference[0]):.0e}) or, as in bf16, at most twice as far from it as published"
        )
        yield Row(
            name=f"{where}: saved bytes", unit="MB", old=saved["published"] / 1e6, new=saved[name] / 1e6, equal=equal,
            goal_ratio=GOALS.get((media.shape[1], name == "folded")), note=note,
        )  # fmt: skip
        if seconds:
            yield Row(
                name=f"{where}: time", unit="ms", old=seconds["published"] * 1e3, new=seconds[name] * 1e3, equal=equal,
                note=note,
            )  # fmt: skip


def _exact(new: Tensor, old: Tensor, reference: Tensor) -> bool:
    """The published gradients of norms are long sums, some of them with errors above the limit themselves."""
    return error(new, reference) <= EXACT or as_accurate(new, old, reference)


def _step(
    call: Callable[[str, Tensor], Tensor], name: str, media: Tensor, connector: AnchorFormerConnector
) -> list[Tensor]:
    """Output and every gradient."""
    out = call(name, media)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, list(connector.parameters()), grad)]
