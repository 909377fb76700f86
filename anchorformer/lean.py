"""Gives a language model's norms, gates and rotations the kernels of this package, in place and by instance.

Neither classes nor parameters change: only the `forward` of single modules is replaced, so that the state dict, hooks
(ZeRO-3 gathers weights by them), LoRA-wrapped linears and other models in the same process are left alone.
"""

from __future__ import annotations

import logging
from types import FunctionType, MethodType
from typing import Any, cast

from torch import Tensor, nn

from anchorformer.kernels.rms_norm import rms_norm
from anchorformer.kernels.rope import rotate
from anchorformer.kernels.swiglu import swiglu

log = logging.getLogger(__name__)

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Families whose modules compute exactly what is put in their place; the names of their classes begin so."""

ROTATION = "apply_rotary_pos_emb"
"""What attention modules of these families call their rotation, a function of their file."""


def make_lean(language_model: nn.Module) -> int:
    """Replaces the forward of every RMSNorm, gated feed-forward and attention of a known family.

    A module of another family stays as it is: what is not known to be the same is not replaced.

    Returns:
        how many modules were replaced; 0 is logged with the reason.
    """
    replaced = 0
    for module in language_model.modules():
        kind = type(module).__name__
        family = next((name for name in FAMILIES if kind.startswith(name)), "")
        forward = _forward_of(kind.removeprefix(family), module) if family else None
        if forward is not None:
            module.forward = MethodType(forward, module)
            replaced += 1
    if not replaced:
        log.info("%s keeps its own norms and gates: known are %s", type(language_model).__name__, ", ".join(FAMILIES))
    return replaced


def _forward_of(kind: str, module: nn.Module) -> Any:
    if kind == "RMSNorm":
        return _rms_norm_forward
    if kind == "MLP" and cast(Any, module).config.hidden_act == "silu":
        return _gated_forward
    if kind == "Attention":
        return _with_own_rotation(type(module).forward)
    return None


def _rms_norm_forward(module: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _gated_forward(module: Any, x: Tensor) -> Tensor:
    return cast(Tensor, module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x))))


def _with_own_rotation(forward: Any) -> Any:
    """The family's own code, in which the name of the rotation means ours; None if that name does not occur in it."""
    if not isinstance(forward, FunctionType) or ROTATION not in forward.__code__.co_names:
        return None
    names = {**forward.__globals__, ROTATION: rotate}
    return FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
