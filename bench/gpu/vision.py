"""The whole vision tower on one card: as published, as transformers runs it with SDPA, ours, and ours compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionConfig

from anchorformer.contracts import VisionNeeds
from anchorformer.vision import VisionTower
from bench.gpu.session import Columns, Session, relative_error
from bench.gpu.shapes import made_in
from bench.gpu.timing import measure
from bench.published.vision import PublishedTower


def vision(session: Session) -> None:
    """Tokens of the tapped block at each image size, with the same weights in all variants."""
    scale = session.scale
    for side, tokens, batch in scale.vision_batches:
        config = CLIPVisionConfig(**{**scale.vision, "image_size": side})
        with made_in(scale):
            whole = AutoModel.from_config(config, attn_implementation="sdpa", dtype=scale.dtype).eval()
            pixels = [(torch.randn(batch, 3, side, side),) for _ in range(2)]
        ours = VisionTower(copy.deepcopy(whole), VisionNeeds(layer=-2, cls_scores=True)).requires_grad_(False)
        published = PublishedTower(copy.deepcopy(whole))
        compiled = torch.compile(ours, fullgraph=True, backend=session.compiler)
        reference = published(*pixels[0])[0]

        variants: dict[str, Callable[[Tensor], Tensor]] = {
            "published": partial(_tokens_and_row, published), "sdpa, all blocks": partial(_all_blocks, whole),
            "ours": partial(_ours, ours), "ours, compiled": partial(_ours, compiled),
        }  # fmt: skip
        for variant, run in variants.items():
            labels = {"what": "vision tower", "variant": variant, "side": side, "tokens": tokens, "batch": batch}
            seconds = 90 if run is variants["ours, compiled"] else 5
            session.row(labels, seconds, partial(_row, session, run, pixels, reference))
        torch.compiler.reset()


def _tokens_and_row(tower: PublishedTower, pixels: Tensor) -> Tensor:
    return tower(pixels)[0]


def _all_blocks(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        tokens: Tensor = model(pixels, output_hidden_states=True).hidden_states[-2]
    return tokens


def _ours(tower: Callable[..., object], pixels: Tensor) -> Tensor:
    tokens: Tensor = tower(pixels).tokens_BNV  # type: ignore[attr-defined]
    return tokens


def _row(session: Session, run: Callable[[Tensor], Tensor], pixels: list[tuple[Tensor]], reference: Tensor) -> Columns:
    error = relative_error(run(*pixels[0]), reference)
    timing = measure(run, pixels, session.scale.device, seconds=0.5)
    return {**timing.columns(), "ms_per_image": timing.ms / len(reference), "error": error}
