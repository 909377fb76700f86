"""The anchor selection on one card: published loops, torch, torch in a CUDA graph, Triton with each number of warps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from anchorformer.kernels import selection_triton
from anchorformer.kernels.selection import _plain as select_plain
from bench.gpu.session import Columns, Session
from bench.gpu.timing import graphed, measure
from bench.published.selection import select

BATCHES = (1, 8, 32, 128)
LARGEST_PUBLISHED = 8
"""Images that the published loops are given; their time grows with the images."""
NUM_ANCHORS = (65, 145, 257)
WARPS = (1, 2, 4, 8)
Way = Callable[[Tensor, int], Any]
AGREEMENT = 0.03
"""How much heads that agree differ, against a spread of 1: then each ranking repeats what is taken already."""


def scores(heads: int, tokens: int, batch: int, *, agree: bool, device: torch.device) -> Tensor:
    """fp32 [CLS] logits (B, H, N) whose heads rank independently of each other, or almost alike."""
    own = torch.randn(batch, heads, tokens, device=device)
    return torch.randn(batch, 1, tokens, device=device) + AGREEMENT * own if agree else own


def selection(session: Session) -> None:
    """All ways, with the sets compared to the published loops on the CPU."""
    device, patch = session.scale.device, session.scale.vision["patch_size"]
    heads = session.scale.vision["num_attention_heads"]
    tokens = (session.scale.sides[0] // patch) ** 2 + 1
    torch.manual_seed(0)
    for agree in (False, True):
        for num_anchors in (session.scale.num_anchors,) if session.tiny else NUM_ANCHORS:
            for batch in BATCHES[:2] if session.tiny else BATCHES:
                inputs = [(scores(heads, tokens, batch, agree=agree, device=device), num_anchors) for _ in range(4)]
                expected = select(inputs[0][0][:LARGEST_PUBLISHED].cpu(), num_anchors)
                for variant, make in _variants(session, inputs[0], batch).items():
                    labels = {"what": "selection", "variant": variant, "heads_agree": agree, "anchors": num_anchors,
                              "batch": batch}  # fmt: skip
                    session.row(labels, 1, partial(_row, session, make, inputs, expected))


def _row(
    session: Session, make: Callable[[], Way], inputs: list[tuple[Tensor, int]], expected: list[list[int]]
) -> Columns:
    run = make()
    found = run(*inputs[0])
    columns: Columns = {}
    if found is not None:  # a replayed graph hands nothing back
        got = found if isinstance(found, list) else found.tolist()
        columns["equal"] = got[:LARGEST_PUBLISHED] == expected
    timing = measure(run, inputs, session.scale.device, seconds=0.05)
    return {**timing.columns(), "ms_per_image": timing.ms / len(inputs[0][0]), **columns}


def _variants(session: Session, arguments: tuple[Tensor, int], batch: int) -> dict[str, Callable[[], Way]]:
    """How to make each way; what cannot be made fails in its own row."""
    published: dict[str, Callable[[], Way]] = {"published": lambda: select} if batch <= LARGEST_PUBLISHED else {}
    makers = published | {"torch": lambda: select_plain}
    if session.tiny:
        return makers
    makers |= {
        "triton": lambda: selection_triton.launch,
        "torch, graph": lambda: graphed(select_plain, arguments),
        "triton, graph": lambda: graphed(selection_triton.launch, arguments),
    }
    return makers | {f"triton, {warps} warps": partial(_with_warps, warps) for warps in WARPS}


def _with_warps(warps: int) -> Callable[[Tensor, int], Tensor]:
    def run(scores_BHN: Tensor, num_anchors: int) -> Tensor:
        batch, heads, tokens = scores_BHN.shape
        indices_BT = torch.empty(batch, num_anchors, dtype=torch.int64, device=scores_BHN.device)
        selection_triton.select_kernel[(batch,)](
            scores_BHN, indices_BT, *scores_BHN.stride(), heads, (num_anchors - 1) // heads, tokens - 1, num_anchors,
            BLOCK=triton.next_power_of_2(tokens - 1), num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
        return indices_BT

    return run
