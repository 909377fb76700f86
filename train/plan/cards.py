"""Memory and peak of the accelerators that runs are planned for, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from anchorformer.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Card:
    """One accelerator, by its data sheet.

    Attributes:
        words: what its device name holds, as torch reports it.
        memory_gb: as it is sold. A card of "80 GB" holds 80 GiB, 7 % more than is counted here: that much is left to
            the fragments of the allocator.
        peak_tflops: bf16 matrix products accumulated in fp32, without sparsity.
        memory_gbs: speed of its memory in GB/s.
        link_gbs: to the other cards of its node, in GB/s and one direction: NVLink where all cards of a node are joined
            by it, else PCIe.
    """

    words: tuple[str, ...]
    memory_gb: float
    peak_tflops: float
    memory_gbs: float
    link_gbs: float


CARDS = {
    "b200": Card(words=("b200",), memory_gb=180, peak_tflops=2250, memory_gbs=8000, link_gbs=900),
    "h200-nvl": Card(words=("h200", "nvl"), memory_gb=141, peak_tflops=835, memory_gbs=4800, link_gbs=64),
    "h200": Card(words=("h200",), memory_gb=141, peak_tflops=989, memory_gbs=4800, link_gbs=450),
    "gh200": Card(words=("gh200",), memory_gb=96, peak_tflops=989, memory_gbs=4000, link_gbs=450),
    "h100-pcie": Card(words=("h100", "pcie"), memory_gb=80, peak_tflops=756, memory_gbs=2000, link_gbs=64),
    "h100-nvl": Card(words=("h100", "nvl"), memory_gb=94, peak_tflops=835, memory_gbs=3900, link_gbs=64),
    "h100": Card(words=("h100",), memory_gb=80, peak_tflops=989, memory_gbs=3350, link_gbs=450),
    "h800": Card(words=("h800",), memory_gb=80, peak_tflops=989, memory_gbs=3350, link_gbs=200),
    "a100-40gb": Card(words=("a100", "40gb"), memory_gb=40, peak_tflops=312, memory_gbs=1555, link_gbs=300),
    "a100-80gb": Card(words=("a100", "80gb"), memory_gb=80, peak_tflops=312, memory_gbs=2039, link_gbs=300),
    "a800": Card(words=("a800",), memory_gb=80, peak_tflops=312, memory_gbs=2039, link_gbs=200),
    "l40s": Card(words=("l40s",), memory_gb=48, peak_tflops=362, memory_gbs=864, link_gbs=32),
    "a6000": Card(words=("rtx", "a6000"), memory_gb=48, peak_tflops=155, memory_gbs=768, link_gbs=32),
    "rtx4090": Card(words=("rtx", "4090"), memory_gb=24, peak_tflops=165, memory_gbs=1008, link_gbs=32),
    "a10": Card(words=("a10",), memory_gb=24, peak_tflops=125, memory_gbs=600, link_gbs=32),
    "l4": Card(words=("l4",), memory_gb=24, peak_tflops=121, memory_gbs=300, link_gbs=32),
}  # fmt: skip
"""Special forms of a card come before the plain one. Source: NVIDIA's data sheets; of NVLink half of what they say,
which is both directions, and PCIe 4.0 or 5.0 with 16 lanes."""


def named_card(name: str) -> Card:
    """
    Raises:
        UserError: a name that is not in the table.
    """
    if name not in CARDS:
        raise UserError(
            f"hardware.card={name} is not known", found=name, expected=f"one of {', '.join(CARDS)}",
            remedy="set hardware.memory_gb instead, or add the card to train/plan/cards.py",
        )  # fmt: skip
    return CARDS[name]


def card_of_device(device_name: str) -> Card | None:
    """The card that torch reports under this name, e.g. `NVIDIA A100-SXM4-80GB`; None where it is not in the table."""
    words = re.split(r"[^a-z0-9]+", device_name.lower())
    if {"mig", "laptop"} & set(words):  # a part of the card, and another card of the same name
        return None
    return next((card for card in CARDS.values() if set(card.words) <= set(words)), None)
