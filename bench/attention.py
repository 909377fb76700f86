"""Attention on a CPU without backward: torch's fused kernel, against plain products block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import eager_attention_forward

from anchorformer.kernels.attention import attend
from anchorformer.kernels.backend import Backend
from bench.runner import Row, Size, as_accurate, cpu_seconds, error

POSITIONS = {Size.tiny: (50,), Size.quick: (577, 2305), Size.full: (577, 1025, 2305, 5185)}
HEADS, WIDTH = 16, 64
SCALE = WIDTH**-0.5


@torch.no_grad()
def rows(size: Size) -> Iterator[Row]:
    torch.manual_seed(0)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for positions in POSITIONS[size]:
            inputs = [torch.randn(1, HEADS, positions, WIDTH).to(dtype) for _ in range(3)]
            reference = attend(*(x.double() for x in inputs), scale=SCALE, backend=Backend.matmul)
            eager = eager_attention_forward(nn.Module().eval(), *inputs, None, scaling=SCALE)[0]
            ways: dict[str, Callable[[], Tensor]] = {
                "old": partial(attend, *inputs, scale=SCALE, backend=Backend.sdpa),
                "new": partial(attend, *inputs, scale=SCALE, backend=Backend.matmul),
            }
            old, new = ways["old"](), ways["new"]()
            seconds = cpu_seconds(dict(ways), repeats=3)
            yield Row(
                name=f"attention without backward, {positions} positions, {name}: time", unit="ms",
                old=seconds["old"] * 1e3, new=seconds["new"] * 1e3, equal=as_accurate(new, eager, reference),
                note=f"old: SDPA; new: products in blocks; {HEADS} heads of {WIDTH}; equal: at most twice as far from "
                f"fp64 as transformers' eager attention ({error(new, reference):.1e}, {error(eager, reference):.1e}; "
                f"SDPA, which keeps its scores in fp32, {error(old, reference):.1e})",
            )  # fmt: skip
