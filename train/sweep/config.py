"""What a sweep is: its grids, what is fixed, the stages of a trial, and where trials are executed; imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from anchorformer.errors import UserError
from anchorformer.schema import Schema
from data.config import Count, NotNegative
from train.choices import StageName
from train.config import Positive


class Executor(str, Enum):
    """Who starts the trials."""

    local = "local"
    """This process, on this machine; it ends when they have ended."""
    slurm = "slurm"
    """A job array through submitit; this process ends when the array is submitted."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig(Schema):
    """What one trial asks Slurm for beside a card for each of its ranks."""

    partition: str | None = None
    account: str | None = None
    hours: Positive = 24.0
    """Longest for one attempt at a trial."""
    cpus_per_rank: Count = 8
    memory_gb: Positive | None = None
    """Of a trial's node; null leaves it to the cluster."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Schema):
    """One sweep: the union of its grids, once for each seed."""

    name: str
    """Its folder under `output_root`, and the group of its runs in a tracker."""
    grids: dict[str, list[dict[str, Any]]]
    """Name -> mappings of axis (config key or group; `align:` or `finetune:` before it limits it to a stage) to a value
    or a list of values: the grid is their products, one behind the other. Points that come to the same configs are one
    trial, in whichever grids they are."""
    overrides: tuple[str, ...] = ()
    """What all trials share, as on the command line of a run, with the same prefixes."""
    seeds: tuple[NotNegative, ...] = (0,)
    stages: tuple[StageName, ...] = (StageName.align, StageName.finetune)
    """Of a trial, in their order; what finetune starts from is its align, or `init_from` where there is none."""
    evals: dict[StageName, tuple[str, ...]] = field(default_factory=dict)
    """Stage -> words of `python -m evals` beside model and data.root; none where a stage is not listed."""
    variants: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    """Grid -> name -> words by which the last stage's evaluation is made once more, with another selector or decoding,
    of all trials of that grid."""
    note: str = ""
    """What a reader of its report has to know first."""
    slots: Count | None = None
    """Trials at once; null is as many as the cards allow, one on CPU."""
    cards: tuple[NotNegative, ...] | None = None
    """Numbers of the CUDA devices to share out, disjoint among trials; null is those that are visible."""
    executor: Executor = Executor.local
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    retry_failed: bool = False
    """Whether failed trials are started again; interrupted ones always are."""
    dry_run: bool = False
    """Only lists the points with their trials, what is done and what would run."""
    output_root: str = "checkpoints"

    def __post_init__(self) -> None:
        check(self)


def every_product(sweep: SweepConfig) -> list[tuple[str, dict[str, Any]]]:
    """The axes of every product, with the name of its grid."""
    return [(name, axes) for name, products in sweep.grids.items() for axes in products]


def check(sweep: SweepConfig) -> None:
    """Checks that span several fields.

    Raises:
        UserError: a name that leads out of `output_root`, no grid or axis without values, a seed twice, stages in the
            wrong order, evals of a stage that is not run, variants of no grid or no evaluation, a card twice.
    """
    if not re.fullmatch(r"\w[\w.-]*", sweep.name):
        raise UserError(
            "the sweep's name is no folder name", found=f"name={sweep.name}", expected="letters, digits, - _ .",
            remedy="set output_root=... for another place",
        )  # fmt: skip
    empty = [f"{grid}.{axis}" for grid, axes in every_product(sweep) for axis, value in axes.items() if value == []]
    if not any(sweep.grids.values()) or empty:
        raise UserError(
            "the sweep has no points", found=", ".join(f"{name}=[]" for name in empty) or "grids={}",
            expected="at least one value on every axis", remedy="give grids.<name>.<axis> values",
        )  # fmt: skip
    distinct = (("seeds", sweep.seeds, "0"), ("cards", sweep.cards or (0,), "0"), ("stages", sweep.stages, "align"))
    for what, values, example in distinct:
        if not values or len(set(values)) < len(values):
            raise UserError(
                f"{what} has to name different ones", found=f"{what}={[str(value) for value in values]}",
                expected="at least one, and none twice", remedy=f"e.g. {what}=[{example}]",
            )  # fmt: skip
    if sweep.stages == (StageName.finetune, StageName.align):
        raise UserError(
            "the stages are in the wrong order", found="stages=[finetune,align]", expected="[align,finetune]",
            remedy="align comes first",
        )  # fmt: skip
    idle = [stage.value for stage in sweep.evals if stage not in sweep.stages]
    if idle:
        raise UserError(
            "evals are asked of a stage that is not run", found=", ".join(f"evals.{stage}" for stage in idle),
            expected=f"stages={[stage.value for stage in sweep.stages]}",
            remedy=f"drop evals.{idle[0]}, or add the stage",
        )  # fmt: skip
    unknown = [grid for grid in sweep.variants if grid not in sweep.grids]
    if unknown or (any(sweep.variants.values()) and sweep.stages[-1] not in sweep.evals):
        raise UserError(
            "variants are made of an evaluation that is not there",
            found=", ".join(f"variants.{grid}" for grid in unknown) or f"no evals.{sweep.stages[-1].value}",
            expected=f"grids of {sorted(sweep.grids)}, and an evaluation of the last stage",
            remedy="correct variants, or drop them: ~variants",
        )  # fmt: skip
