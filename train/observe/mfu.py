"""Model FLOPs utilisation of a run: its useful arithmetic, as `train.plan` counts it, over the peak of its cards."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from anchorformer.errors import UserError
from anchorformer.parts import parse_tiling
from train.choices import Part
from train.distributed import World
from train.facts import StepFacts
from train.plan.cards import card_of_device
from train.plan.flops import Work, model_flops
from train.plan.shapes import Shapes, shapes_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mfu:
    """Share of the peak that a step reaches. Source: PaLM, arXiv 2204.02311, appendix B.

    Attributes:
        trains: parts whose weights have gradients.
        peak: FLOP/s of all cards together.
    """

    shapes: Shapes
    trains: Collection[Part]
    peak: float

    def share(self, facts: StepFacts, seconds: float) -> float:
        """Of a step that took `seconds`; recomputed activations, padding and waiting lower it."""
        work = Work(
            positions=facts.tokens, squares=facts.squares, supervised=facts.supervised, images=facts.images,
            # As if all samples had equally many images: what looking at them pays is a small part.
            looks=facts.tokens * facts.images / max(1, len(facts.sample_ids)),
        )  # fmt: skip
        return sum(model_flops(self.shapes, self.trains, work).values()) / (seconds * self.peak)


def mfu_of(model: nn.Module, trains: Collection[Part], world: World) -> Mfu | None:
    """None where there is no peak to compare with; but for a CPU, the log says why."""
    if world.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(world.device)
    card = card_of_device(name)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if card is None or dtypes != {torch.bfloat16}:
        log.info("no MFU: %s", f"the peak of {name} is not known" if card is None else "it is a share of the bf16 peak")
        return None
    config: Any = model.config
    try:
        shapes = shapes_of(
            config.vision_config.to_dict(), config.text_config.to_dict(), config.selector, config.connector,
            parse_tiling(config.tiling), config.integration,
        )  # fmt: skip
    except UserError as error:
        log.info("no MFU: %s (%s)", error.what, error.found)
        return None
    return Mfu(shapes, trains, world.size * card.peak_tflops * 1e12)
