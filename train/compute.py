"""How the parts of a model are computed, beside what they compute: layers twice or once, compiled or as written."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from torch import nn

from train.choices import Checkpointing, Part
from train.config import HardwareConfig

log = logging.getLogger(__name__)


def set_computation(model: nn.Module, hardware: HardwareConfig) -> None:
    """Applies `hardware.activation_checkpointing` and `hardware.compile`; before an engine is built around the model.

    Neither changes a parameter's name. Checkpointing holds in training mode only, and changes no number: what backward
    needs of a layer is computed by the same operations a second time.
    """
    if hardware.activation_checkpointing is Checkpointing.on:
        language_model: Any = getattr(model, Part.language_model.value)
        with warnings.catch_warnings():
            # transformers 5.23 has another name for it, which 5.17 does not know.
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*activation_checkpointing_enable")
            # The reentrant form drops gradients without a word where its inputs require none.
            language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        log.info("the language model's layers are computed a second time in backward")
    for part in hardware.compile:
        getattr(model, part.value).compile()
        log.info("%s runs through torch.compile", part.value)
