"""Which number format a run trains in, chosen once from device, capability and size."""

from __future__ import annotations

import logging

import torch

from anchorformer.devices import Precision
from anchorformer.errors import UserError
from anchorformer.kernels.backend import bf16_is_fast_on_cpu

log = logging.getLogger(__name__)

SMALLEST_BF16_WIDTH = 64
"""Language-model width below which CPU time goes into starting operations, not into multiplying: fp32 costs nothing."""


def choose_dtype(precision: Precision, device: torch.device, text_width: int) -> torch.dtype:
    """The parameters' dtype; the optimizer's weights are fp32 either way.

    Args:
        text_width: hidden size of the language model.

    Raises:
        UserError: bf16 is asked for on a CUDA device that has none.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision is Precision.bf16 and not has_bf16:
            raise UserError(
                "hardware.precision=bf16 does not fit this device", found=torch.cuda.get_device_name(device),
                expected="compute capability 8.0 or newer", remedy="set hardware.precision=fp32",
            )  # fmt: skip
        fast, reason = has_bf16, f"CUDA device with{'' if has_bf16 else 'out'} bf16"
    elif not bf16_is_fast_on_cpu():
        fast, reason = False, "this CPU has no bf16 instructions"
    else:
        fast = text_width >= SMALLEST_BF16_WIDTH
        relation = "at least" if fast else "under"
        reason = f"CPU with bf16 instructions, language model {relation} {SMALLEST_BF16_WIDTH} wide"
    if precision is not Precision.auto:
        fast, reason = precision is Precision.bf16, "asked for"
    dtype = torch.bfloat16 if fast else torch.float32
    log.info("precision: %s (%s)", str(dtype).removeprefix("torch."), reason)
    return dtype
