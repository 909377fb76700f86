"""Which attention backend runs where: the one place that decides, from device, dtype and size."""

from __future__ import annotations

import logging
from enum import Enum
from functools import cache

import torch

from anchorformer.kernels import varlen

logger = logging.getLogger(__name__)


class Backend(str, Enum):
    """The ways to compute attention; all give the same result within rounding."""

    matmul = "matmul"
    """Scores as one tensor, softmax, product: the plain twin, and the fastest on CPU at small sizes."""
    sdpa = "sdpa"
    """torch's fused scaled_dot_product_attention: no score tensor."""
    varlen = "varlen"
    """torch.nn.attention.varlen over cu_seqlens: no padding and no score tensor, CUDA half precision only."""
    flash_attn = "flash-attn"
    """The same by the flash-attn wheel, where it is installed."""


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
        backend, reason = _choose_flat_on_cuda(dtype, head_width)
        return _log(backend, device, dtype, reason)
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
def _choose_flat_on_cuda(dtype: torch.dtype, head_width: int) -> tuple[Backend, str]:
    wheel = varlen.flash_attn_obstacle(dtype, head_width)
    if wheel is None:
        return Backend.flash_attn, "flat rows need no padding, and the wheel is installed"
    own = varlen.torch_obstacle(dtype, head_width)
    if own is None:
        return Backend.varlen, f"flat rows need no padding; {wheel}"
    return Backend.sdpa, f"flat rows padded to a rectangle, because {own}"


def _log(backend: Backend, device: torch.device, dtype: torch.dtype, reason: str) -> Backend:
    if not torch.compiler.is_compiling():
        _log_once(backend, device.type, dtype, reason)
    return backend


@cache
def _log_once(backend: Backend, device_type: str, dtype: torch.dtype, reason: str) -> None:
    logger.info("attention on %s in %s: %s (%s)", device_type, str(dtype).removeprefix("torch."), backend.value, reason)
