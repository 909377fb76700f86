"""Says before anything is loaded what a run needs: memory, links, hours and cost; fails if it does not fit.

`python -m train plan experiment=... hardware=... [stage=...] [key=value ...]`; without a stage both are planned, and
neither data nor a start model has to be there. What cannot be known is said by flags: --mfu=0.4 (share of the peak),
--price= (of a card for an hour), --samples= (of an epoch), --text= and --supervised= (positions of a mean sample),
--images= (of a mean sample), --tiles= (of a mean image; the most that the tiling allows where nothing is said).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from anchorformer.errors import UserError
from train.choices import StageName
from train.compose import compose
from train.plan.course import Assumptions
from train.plan.dealing import read_lengths
from train.plan.table import plan_stage, render

NOT_THERE_YET = "not-there-yet"
MEAN = ("text", "supervised", "images")
"""Flags that describe a mean sample."""


def main(arguments: list[str]) -> int:
    """
    Raises:
        UserError: a stage that does not fit, with what would; and what `compose` and `plan_stage` raise.
    """
    overrides, assumed = read(arguments)
    keys = {text.split("=", 1)[0].lstrip("+") for text in overrides}
    stages = [[]] if "stage" in keys else [[f"stage={stage.value}"] for stage in StageName]
    start = [] if "init_from" in keys else [f"init_from={NOT_THERE_YET}"]
    misfits = []
    for stage in stages:
        plan = plan_stage(compose([*overrides, *stage, *start], stand_ins={"data.root": NOT_THERE_YET}))
        print(render(plan, assumed) + "\n")
        if plan.remedies:
            misfits.append(plan)
    for plan in misfits:
        raise UserError(
            f"stage {plan.config.stage.name.value} does not fit", found=f"{plan.choice.memory.total / 1e9:.1f} GB",
            expected=f"at most {(plan.limit or 0) / 1e9:.1f} GB", remedy="; or ".join(plan.remedies),
        )  # fmt: skip
    return 0


def read(arguments: list[str]) -> tuple[list[str], Assumptions]:
    """The overrides among a plan's words, and what its flags, or their defaults, assume.

    Raises:
        UserError: a flag whose value means nothing, or two that contradict each other.
    """
    parser = argparse.ArgumentParser(prog="python -m train plan", add_help=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--mfu", type=float, default=0.4)
    for name in ("price", *MEAN, "tiles", "network", "disk"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--lengths", type=Path)
    # What was not given has its default in Assumptions.
    values = {key: value for key, value in vars(parser.parse_intermixed_args(arguments)).items() if value is not None}
    if not 0 < values["mfu"] <= 1:
        raise UserError(
            "--mfu is a share of the peak", found=values["mfu"], expected="above 0, at most 1", remedy="e.g. --mfu=0.4"
        )
    for name in {"price", "network", "disk", "tiles", "samples"} & values.keys():
        if not values[name] > 0:
            raise UserError(
                f"--{name} is no amount", found=values[name], expected="above 0", remedy="correct or drop it"
            )
    if "lengths" in values:
        mean = sorted({*MEAN} & values.keys())
        if mean:
            raise UserError(
                "a mean sample and counted ones are two answers to one question", found=f"--lengths and --{mean[0]}",
                expected="one of them", remedy=f"drop --{mean[0]}",
            )  # fmt: skip
        values["lengths"] = read_lengths(values["lengths"])
    return values.pop("overrides"), Assumptions(**values)
