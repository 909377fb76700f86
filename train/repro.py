"""How far two runs of one config on one machine agree to the bit: decided before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from anchorformer.devices import Device
from anchorformer.errors import UserError
from train.choices import Repro
from train.config import RunConfig

NO_FORM = "does not have a deterministic implementation"
"""How torch begins to say it; the operation's name stands before."""


def set_determinism(config: RunConfig) -> None:
    """Seeds torch and takes deterministic kernels: on CPU always, where they cost nothing, on CUDA under strict."""
    torch.manual_seed(config.seed)
    is_on_cpu = config.hardware.device is Device.cpu or not torch.cuda.is_available()
    if is_on_cpu or config.repro is Repro.strict:
        # cuBLAS is deterministic only in a workspace of fixed size, and reads this when its first handle is made.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def naming_what_is_not_deterministic() -> Iterator[None]:
    """Says which operation repro=strict has met that has no deterministic form.

    Raises:
        UserError: in place of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        operation, is_refused, _ = str(error).partition(NO_FORM)
        if not is_refused:
            raise
        raise UserError(
            f"{operation.strip()} has no deterministic form", found="repro=strict on this device and these kernels",
            expected="operations that give the same bits every time", remedy="set repro=fast, or train on CPU",
        ) from error  # fmt: skip
