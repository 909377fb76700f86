"""When a run must stop: numbers that cannot be trained on, frozen weights that moved, trained ones that did not."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from anchorformer.errors import UserError
from train.choices import Part
from train.distributed import World
from train.engine import Engine
from train.facts import StepFacts
from train.run.fingerprint import Print, fingerprint

log = logging.getLogger(__name__)


class TrainingHalted(UserError):
    """The run stopped itself; the last complete checkpoint is untouched."""

    exit_code = 3


def check_numbers(step: int, loss: float, norms: dict[Part, float], facts: StepFacts) -> None:
    """Stops before the optimizer's step is taken; every rank sees the same numbers and so stops together.

    Raises:
        TrainingHalted: loss or gradient not finite, or no gradient in a trained connector although the step had both
            images and targets; names the step's samples.
    """
    broken = {f"gradient of {part.value}": norm for part, norm in norms.items() if not math.isfinite(norm)}
    if not math.isfinite(loss):
        broken = {"loss": loss, **broken}
    if broken:
        raise _halt(
            f"step {step}: {', '.join(f'{name} is {value}' for name, value in broken.items())}", facts,
            "finite numbers", "look at these samples with `python -m data scan`, lower the learning rate, or try fp32",
        )  # fmt: skip
    if norms.get(Part.connector) == 0.0 and facts.images > 0 and facts.supervised > 0:
        raise _halt(
            f"step {step}: the connector's gradient is zero", facts, "a gradient wherever images and targets are",
            "the images do not reach the loss: check the template's <image> and that answers follow the images",
        )  # fmt: skip


def _halt(what: str, facts: StepFacts, expected: str, remedy: str) -> TrainingHalted:
    return TrainingHalted(what, found=f"samples {', '.join(facts.sample_ids)}", expected=expected, remedy=remedy)


class FrozenGuard:
    """Proves by hash that frozen parameters stay as they were and that trained parts move.

    Hashes are of what each rank holds, so the proof costs no gathering of weights.
    """

    AFTER = 3
    """Steps after which the proof is taken; from then on only for as long as no image has been seen."""

    def __init__(self, engine: Engine, world: World) -> None:
        self._engine, self._world = engine, world
        self.before = fingerprint(engine.values())
        self._trained = {name for name, value in engine.model.named_parameters() if value.requires_grad}
        self._steps = 0
        self._has_seen_images = False
        self.is_proven = False

    @property
    def frozen(self) -> dict[str, Print]:
        """Fingerprints of the frozen parameters."""
        return {name: value for name, value in self.before.items() if name not in self._trained}

    def observe(self, facts: StepFacts) -> None:
        """Call after each step.

        Raises:
            AssertionError: a frozen parameter changed, or a trained part did not; a fault of ours, not of the user.
        """
        self._steps += 1
        self._has_seen_images |= facts.images > 0 and facts.supervised > 0
        if not self.is_proven and self._steps >= self.AFTER and self._has_seen_images:
            self.prove()

    def finish(self) -> None:
        """Call after the last step: a run shorter than `AFTER` is proven here.

        Raises:
            AssertionError: see `observe`.
        """
        if not self.is_proven and self._has_seen_images:
            self.prove()

    def prove(self) -> None:
        """Compares now with the start.

        Raises:
            AssertionError: see `observe`.
        """
        after = fingerprint(self._engine.values())
        moved = self._union([name for name, value in after.items() if value != self.before[name]])
        if moved - self._trained:
            raise AssertionError(f"frozen parameters changed: {_some(moved - self._trained)}")
        still = self._trained - moved
        unmoved = {_part(name) for name in still} - {_part(name) for name in moved}
        if unmoved:
            raise AssertionError(f"trained parts did not change: {_some(unmoved)}")
        if still:
            # Not an error: a key bias without rotary positions, for one, has no gradient but rounding.
            log.warning("trained parameters that have not changed in %d steps: %s", self._steps, _some(still))
        self.is_proven = True

    def _union(self, names: Sequence[str]) -> set[str]:
        return {name for part in self._world.gather(list(names)) for name in part}


def _part(name: str) -> str:
    return name.split(".", 1)[0]


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
