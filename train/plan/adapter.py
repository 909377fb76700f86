"""What an adapter of low rank adds to the plan: values, what it keeps for backward, 4-bit weights beneath it."""

from __future__ import annotations

from anchorformer.errors import UserError
from train.config import LoraConfig
from train.plan.shapes import TextShape

NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes per weight in 4 bits: one 8-bit scale per 64 of them, and one of 32 bits per 256 scales. Source: QLoRA, arXiv
2305.14314, section 3."""


def adapter_values(text: TextShape, lora: LoraConfig) -> int:
    """Trained values of an adapter; all of its layers are alike in every block.

    Raises:
        UserError: a target whose shape is not known.
    """
    return text.layers * lora.rank * sum(width + out for width, out in _targets(text, lora))


def adapter_kept(text: TextShape, lora: LoraConfig, size: int) -> float:
    """Bytes per position that the adapters of one block keep for backward, beside what the block keeps anyway.

    Each keeps its input, or with dropout what is left of it and a mask of bytes, and its product of low rank. Without
    dropout layers that read the same (queries, keys and values; gate and up) keep it once.
    """
    targets = _targets(text, lora)
    kept = size * lora.rank * len(targets)
    if lora.dropout:
        return kept + (size + 1) * sum(width for width, _ in targets)
    readers = {_READS.get(target, target): width for target, (width, _) in zip(lora.targets, targets, strict=True)}
    # The output of attention is kept by attention itself.
    return kept + size * sum(width for reads, width in readers.items() if reads != "o_proj")


_READS = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}


def _targets(text: TextShape, lora: LoraConfig) -> list[tuple[int, int]]:
    """Width of the input and of the output of each adapted layer."""
    shapes = {
        "q_proj": (text.width, text.query), "k_proj": (text.width, text.key), "v_proj": (text.width, text.key),
        "o_proj": (text.query, text.width), "gate_proj": (text.width, text.inner),
        "up_proj": (text.width, text.inner), "down_proj": (text.inner, text.width),
    }  # fmt: skip
    unknown = sorted(set(lora.targets) - shapes.keys())
    if unknown:
        raise UserError(
            "the plan does not know what this adapter costs", found=f"stage.lora.targets with {', '.join(unknown)}",
            expected=f"some of {', '.join(shapes)}", remedy="run unplanned: hardware.card=null",
        )  # fmt: skip
    return [shapes[target] for target in lora.targets]
