"""Which backend runs where: the one place that decides, from device, dtype and size."""

from __future__ import annotations

import importlib.util
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from functools import cache

import torch
from torch import Tensor

from anchorformer.errors import UserError
from anchorformer.kernels import varlen

logger = logging.getLogger(__name__)


class Backend(str, Enum):
    """The ways to compute attention; all give the same result within rounding."""

    matmul = "matmul"
    """Scores, softmax, product: the plain twin, and the fastest on CPU in bf16 at small sizes or without backward."""
    sdpa = "sdpa"
    """torch's fused scaled_dot_product_attention: no score tensor."""
    varlen = "varlen"
    """torch.nn.attention.varlen over cu_seqlens: no padding and no score tensor, CUDA half precision only."""
    flash_attn = "flash-attn"
    """The same by the flash-attn wheel, where it is installed."""


class Kernels(str, Enum):
    """Who computes what the anchors need: their selection, the [CLS] row, the tapped layer's attention."""

    torch = "torch"
    """Plain PyTorch: the twin, and the default where there is no CUDA."""
    triton = "triton"
    """This library's Triton kernels: the default on CUDA."""


LARGEST_MATMUL_POSITIONS = {torch.bfloat16: 640}
"""Longest row for which `matmul` beats `sdpa` on CPU where backward keeps the scores, by dtype (none in fp32).

Measured on one thread of an AVX-512-BF16 EPYC with torch 2.13, matmul / sdpa in milliseconds: bf16 causal forward plus
backward at 100 positions 13 / 37, 200 17 / 31, 512 46 / 51, 1024 90 / 63; fp32 at 100 29 / 17, at 577 45 / 22. Without
backward `matmul` goes block by block, and `python -m bench cpu --full --only attention` has it ahead in bf16 at every
size (x1.6 to x1.8 from 577 to 5185 positions) and at none in fp32. Its scores are rounded to bf16, as eager attention
rounds them: it is as far from fp64 as that is, and four to six times as far as SDPA.
"""


def choose(
    device: torch.device, dtype: torch.dtype, num_positions: int, head_width: int, *, flat: bool, in_blocks: bool
) -> Backend:
    """Chooses the backend; a pure function of its arguments, so a shape always runs the same way.

    Args:
        num_positions: longest row of queries or keys, in positions.
        head_width: width of one head.
        flat: several samples in one row with cu_seqlens, instead of a rectangle.
        in_blocks: no backward follows and no mask is given, so that `matmul` need not hold all scores at a time.
    """
    if device.type == "cuda":
        if not flat:
            return _log(Backend.sdpa, device, dtype, "fused on CUDA at every size")
        backend, reason = _choose_flat_on_cuda(dtype, head_width)
        return _log(backend, device, dtype, reason)
    limit = LARGEST_MATMUL_POSITIONS.get(dtype)
    if limit is None:
        return _log(Backend.sdpa, device, dtype, "fastest on CPU in this dtype at every size")
    if in_blocks:
        return _log(Backend.matmul, device, dtype, "without backward block by block, where it beats sdpa at every size")
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


_asked_for = "auto"


def use(kernels: str) -> None:
    """Settles who computes the operations of `Kernels` in this process; call it before the first forward.

    Args:
        kernels: `auto` (the default: Triton on CUDA, torch elsewhere), `torch` or `triton`.

    Raises:
        UserError: another word, or `triton` where it cannot run.
    """
    global _asked_for
    words = ["auto", *(each.value for each in Kernels)]
    if kernels not in words:
        raise UserError(
            "unknown kernels", found=repr(kernels), expected=f"one of {words}", remedy="correct hardware.kernels"
        )
    obstacle = triton_obstacle()
    if kernels == Kernels.triton and obstacle is not None:
        raise _unavailable(obstacle)
    _asked_for = kernels
    _kernels_on.cache_clear()
    _rows_run_on_liger.cache_clear()


@torch.compiler.assume_constant_result
def kernels_on(device: torch.device) -> Kernels:
    """Who computes the operations of `Kernels` on this kind of device; chosen once, with the reason in the log.

    Raises:
        UserError: `triton` was asked for, and this device cannot run it.
    """
    return _kernels_on(device.type)


@torch.compiler.assume_constant_result
def rows_run_on_liger(device: torch.device) -> bool:
    """Whether what looks at one row at a time (RMSNorm, SwiGLU, RoPE) runs on Liger's kernels or on its plain twin."""
    return _rows_run_on_liger(device.type)


def triton_obstacle() -> str | None:
    """Why Triton cannot run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if triton_is_interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the device is older than compute capability 8.0"
    return None


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current CUDA device, whatever device its tensors are on; inside this they are the same."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def triton_is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, which takes tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _kernels_on(device_type: str) -> Kernels:
    chosen, reason = Kernels.torch, f"the default on {device_type}"
    if _asked_for == Kernels.triton:
        if device_type == "cpu" and not triton_is_interpreted():
            raise _unavailable("it was given tensors on the CPU")
        chosen, reason = Kernels.triton, "asked for"
    elif _asked_for == Kernels.torch:
        reason = "asked for"
    elif device_type == "cuda":
        obstacle = triton_obstacle()
        chosen = Kernels.torch if obstacle else Kernels.triton
        reason = obstacle or reason
    logger.info("anchor kernels on %s: %s (%s)", device_type, chosen.value, reason)
    return chosen


@cache
def _rows_run_on_liger(device_type: str) -> bool:
    if device_type != "cuda" or _asked_for == Kernels.torch:
        reason = "asked for" if device_type == "cuda" else f"the default on {device_type}"
    elif importlib.util.find_spec("liger_kernel") is None:
        reason = "liger_kernel is not installed"
    else:
        logger.info("norms, gates and rotations on cuda: liger (it is installed)")
        return True
    logger.info("norms, gates and rotations on %s: torch (%s)", device_type, reason)
    return False


def _unavailable(obstacle: str) -> UserError:
    return UserError(
        "the Triton kernels were asked for and cannot run",
        found=obstacle,
        expected="triton and a CUDA device of compute capability 8.0 or newer",
        remedy="set hardware.kernels to auto or torch",
    )
