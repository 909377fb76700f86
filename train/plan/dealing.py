"""What dealing samples of real lengths to many ranks leaves of their time: simulated with the trainer's own sampler."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from anchorformer.errors import UserError
from data.sampler import permutation, plan_step
from train.choices import Part
from train.plan.flops import Work, model_flops
from train.plan.shapes import Shapes

DEALT = 16_384
"""Samples that a simulation deals, at least."""


@dataclass(frozen=True)
class Lengths:
    """Samples, one entry each.

    Attributes:
        text: positions without images.
        images: how many.
        supervised: targets.
    """

    text: Sequence[int]
    images: Sequence[int]
    supervised: Sequence[int]

    def works(self, shapes: Shapes, longest: int, tiles: float) -> list[Work]:
        """What each sample is to a model.

        Args:
            longest: positions at which a sample is cut.
            tiles: of an image.
        """
        per_image = shapes.connector.queries * (1 if shapes.view > 1 else tiles)
        works = []
        for text, images, supervised in zip(self.text, self.images, self.supervised, strict=True):
            positions = min(round(text + images * per_image), longest)
            works.append(
                Work(
                    positions=positions, squares=positions**2, supervised=supervised, images=images * tiles,
                    looks=positions * images * tiles,
                )
            )  # fmt: skip
        return works


def mean(works: Sequence[Work]) -> Work:
    """Their mean; its squares are the mean of theirs."""
    return Work(**{field.name: sum(getattr(work, field.name) for work in works) / len(works) for field in fields(Work)})


def read_lengths(path: Path) -> Lengths:
    """The lists of a JSON file, such as `bench/lengths.json`; other keys are left alone.

    Raises:
        UserError: no such file, or lists that are missing, empty or of different lengths.
    """
    remedy = "python -m bench.lengths --tokenizer FOLDER --json FILE ANNOTATIONS writes one"
    if not path.is_file():
        raise UserError(f"{path} is not there", found="no file", expected="counted lengths", remedy=remedy)
    try:
        content = json.loads(path.read_text())
        lists = [content[name] for name in ("text", "images", "supervised")]
        is_right = len({len(values) for values in lists}) == 1 and bool(lists[0])
        is_right = is_right and all(isinstance(value, int) and value >= 0 for values in lists for value in values)
    except (json.JSONDecodeError, KeyError, TypeError):
        is_right = False
    if not is_right:
        raise UserError(
            f"{path} holds no lengths", found=path.read_text()[:60], remedy=remedy,
            expected='{"text": [...], "images": [...], "supervised": [...]}, whole numbers, equally many',
        )  # fmt: skip
    return Lengths(*lists)


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """How even a dealing is.

    Attributes:
        useful: share of all ranks' arithmetic that is done while the slowest of them does its own, where they wait for
            each other in every micro-batch, as they do under ZeRO-2 and 3.
        by_step: the same where they wait once per step, as under ZeRO-0 and 1.
        micro_batches: of a step, on average.
    """

    useful: float
    by_step: float
    micro_batches: float

    @property
    def slowest(self) -> float:
        """Arithmetic of a step's slowest rank over that of a mean one."""
        return 1 / self.by_step


def deal(
    works: Sequence[Work], shapes: Shapes, trains: Collection[Part], *, ranks: int, global_batch: int, micro_batch: int,
    budget: int | None,
) -> Dealing:  # fmt: skip
    """Deals shuffled passes over the samples, step by step, and adds up the arithmetic of every rank.

    Args:
        works: of the samples.
        budget: most positions of a micro-batch.

    Raises:
        UserError: a sample that exceeds the budget.
    """
    positions = [int(work.positions) for work in works]
    if budget is not None and max(positions) > budget:
        raise UserError(
            "a counted sample is longer than any micro-batch may be", found=f"{max(positions)} positions",
            expected=f"at most {budget}", remedy="set data.token_budget to at least data.max_length, or leave it open",
        )  # fmt: skip
    costs = [sum(model_flops(shapes, trains, work).values()) for work in works]
    steps = max(2, -(-DEALT // global_batch))
    passes = -(-steps * global_batch // len(positions))
    stream = np.concatenate([permutation(len(positions), "dealing", epoch) for epoch in range(passes)])
    useful = by_micro = by_step = 0.0
    micro_batches = 0
    for step in range(steps):
        chosen = stream[step * global_batch : (step + 1) * global_batch].tolist()
        plan = plan_step([positions[index] for index in chosen], ranks, micro_batch, budget)
        work = np.array([[sum(costs[chosen[place]] for place in micro) for micro in share] for share in plan])
        useful += work.sum() / ranks
        by_micro += work.max(axis=0).sum()
        by_step += work.sum(axis=1).max()
        micro_batches += work.shape[1]
    return Dealing(useful=useful / by_micro, by_step=useful / by_step, micro_batches=micro_batches / steps)
