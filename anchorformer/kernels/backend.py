"""Which attention backend runs where: the one place that decides, from device, dtype and size."""

from __future__ import annotations

import inspect
import logging
from enum import Enum
from functools import cache

import torch

logger = logging.getLogger(__name__)


class Backend(str, Enum):
    """The three ways to compute attention; all give the same result within rounding."""

    matmul = "matmul"
    """Scores as one tensor, softmax, product: the plain twin, and the fastest on CPU at small sizes."""
    sdpa = "sdpa"
    """torch's fused scaled_dot_product_attention: no score tensor."""
    varlen = "varlen"
    """torch.nn.attention.varlen over cu_seqlens: no padding and no score tensor, CUDA half precision only."""


LARGEST_MATMUL_POSITIONS = {torch.bfloat16: 640}
"""Longest row for which `matmul` beats `sdpa` on CPU, by dtype (none in fp32).

Measured on one thread of an AVX-512-BF16 EPYC with torch 2.13, matmul / sdpa in milliseconds: bf16 causal forward plus
backward at 100 positions 13 / 37, 200 17 / 31, 512 46 / 51, 1024 90 / 63; bf16 vision forward at 577 tokens 13 / 21;
fp32 at 100 29 / 17, at 577 45 / 22.
"""


def choose(device: torch.device, dtype: torch.dtype, num_positions: int, head_width: int, *, flat: bool) -> Backend:
    """Chooses the backend; a pure function of its arguments, so a shape always runs the same way.

    Args:
        num_positions: longest row of queries or keys, in positions.
        head_width: width of one head.
        flat: several samples in one row with cu_seqlens, instead of a rectangle.
    """
    if device.type == "cuda":
        if not flat:
            return _log(Backend.sdpa, device, dtype, "fused on CUDA at every size")
        obstacle = varlen_obstacle(dtype, head_width)
        if obstacle is None:
            return _log(Backend.varlen, device, dtype, "flat rows need no padding")
        return _log(Backend.sdpa, device, dtype, f"flat rows padded to a rectangle, because {obstacle}")
    limit = LARGEST_MATMUL_POSITIONS.get(dtype)
    if limit is None:
        return _log(Backend.sdpa, device, dtype, "fastest on CPU in this dtype at every size")
    if num_positions <= limit:
        return _log(Backend.matmul, device, dtype, f"rows of at most {limit} positions, where it beats sdpa")
    return _log(Backend.sdpa, device, dtype, f"rows of more than {limit} positions")


def bf16_is_fast_on_cpu() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AVX-512-BF16 or AMX); fp32 is faster without."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@cache
def varlen_obstacle(dtype: torch.dtype, head_width: int) -> str | None:
    """Why `varlen` cannot run here, or None; asked once per dtype and head width."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the varlen kernel takes half precision, not {dtype}"
    if head_width % 8 or head_width > 256:
        return f"the varlen kernel takes head widths that 8 divides up to 256, not {head_width}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the varlen kernel needs compute capability 8.0"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if not {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters):
        return f"varlen_attn of torch {torch.__version__} has an older signature"
    return None


def _log(backend: Backend, device: torch.device, dtype: torch.dtype, reason: str) -> Backend:
    if not torch.compiler.is_compiling():
        _log_once(backend, device.type, dtype, reason)
    return backend


@cache
def _log_once(backend: Backend, device_type: str, dtype: torch.dtype, reason: str) -> None:
    logger.info("attention on %s in %s: %s (%s)", device_type, str(dtype).removeprefix("torch."), backend.value, reason)
