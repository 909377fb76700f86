"""The command line of a sweep, taken apart: words of the sweep, words of its runs, and axes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anchorformer.errors import UserError
from anchorformer.schema import parse
from data.overrides import CommandLine, alternatives
from train.choices import StageName
from train.sweep.config import SweepConfig, every_product

COMMAND_LINE = CommandLine(command="python -m train sweep", config="sweep", schema=SweepConfig)
OWN = {"sweep", *(field.name for field in dataclasses.fields(SweepConfig))}
GIVEN_BY_THE_SWEEP = ("run", "stage", "resume", "rehearse")
"""Keys of a run that a trial gets from its sweep."""

_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*", re.ASCII)
_READ_AS_OTHER = re.compile(r"(?i)true|false|null|nan|inf|[\d._]+(e[-+]?\d+)?")


def read(arguments: Sequence[str]) -> SweepConfig:
    """The sweep that a command line means.

    A key of `SweepConfig` is the sweep's own; every other word goes to all runs behind the sweep's `overrides`. One
    with several values (`model.connector.depth=1,2`) is an axis of every product, and takes the place of the one it
    has; so does one with a single value where the product has that axis.

    Raises:
        UserError: what `CommandLine` raises for the sweep's own words; a key that the sweep itself gives to its runs;
            a key of one stage that is an axis of both, or the other way round.
    """
    own = [text for text in arguments if key_of(text).partition(".")[0] in OWN]
    others = [text for text in arguments if text not in own]
    composed = COMMAND_LINE.compose(COMMAND_LINE.read(own))
    composed["grids"] = composed.get("grids") or {"points": [{}]}
    sweep = parse(SweepConfig, composed, COMMAND_LINE.command, COMMAND_LINE.remedy)
    fixed = list(sweep.overrides)
    for text in others:
        stage, word = split_stage(text)
        key, values = alternatives(word) or (word, [None])
        axis = f"{stage.value}:{key}" if stage else key
        for _, axes in every_product(sweep):
            if len(values) > 1 or axis in axes:
                axes[axis] = values
        if len(values) == 1:
            fixed.append(text)
    for text in others:
        _check_reaches_its_stages(text, sweep)
    sweep = dataclasses.replace(sweep, overrides=tuple(fixed))
    for key in [
        key_of(text) for text in (*sweep.overrides, *(axis for _, axes in every_product(sweep) for axis in axes))
    ]:
        if key in GIVEN_BY_THE_SWEEP:
            raise UserError(
                f"'{key}' is given to each run by the sweep", found=key, expected=f"any other key than "
                f"{', '.join(GIVEN_BY_THE_SWEEP)}", remedy="name=... names the sweep, stages=[...] its stages",
            )  # fmt: skip
        if key == "seed":
            raise UserError(
                "'seed' is no axis of a grid", found="seed", expected="seeds=[...], which every grid is crossed with",
                remedy="e.g. seeds=[0,1,2]",
            )  # fmt: skip
    return sweep


def _check_reaches_its_stages(text: str, sweep: SweepConfig) -> None:
    """Refuses a word where an axis would outdo it in silence, because one of the two is limited to a stage."""
    stage, key = split_stage(text)[0], key_of(text)
    for axis in dict.fromkeys(axis for _, axes in every_product(sweep) for axis in axes):
        of_axis = split_stage(axis)[0]
        if key == key_of(axis) and stage is not of_axis and None in (stage, of_axis):
            raise UserError(
                f"'{key}' is an axis of the sweep, for other stages than '{text}' is meant for", found=text,
                expected=f"{axis}=..., which takes the place of the axis: of words with one key a point's is the last",
                remedy=f"write '{axis}=', or a sweep with another axis in conf/sweep/",
            )  # fmt: skip


def key_of(text: str) -> str:
    """The key of a word or an axis, without a stage before it."""
    return split_stage(text)[1].partition("=")[0].lstrip("+~")


def split_stage(text: str) -> tuple[StageName | None, str]:
    """`align:key=value` as its stage and the rest; a word without a stage is meant for all."""
    head, colon, rest = text.partition(":")
    stages = {stage.value: stage for stage in StageName}
    return (stages[head], rest) if colon and head in stages else (None, text)


def words_for(stage: StageName, fixed: Iterable[str], point: Mapping[str, Any]) -> list[str]:
    """The overrides of one stage of a point: of words with the same key the last one stays, and a point's are last."""
    texts = [*fixed, *(f"{axis}={text(value)}" for axis, value in point.items())]
    meant = [word for only, word in map(split_stage, texts) if only in (None, stage)]
    return list({key_of(word): word for word in meant}.values())


def text(value: Any) -> str:
    """A value as the right side of an override.

    Raises:
        UserError: a mapping, which is several values.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(text, value))}]"
    if isinstance(value, str):
        is_plain = _PLAIN.fullmatch(value) and not _READ_AS_OTHER.fullmatch(value)
        return value if is_plain else json.dumps(value, ensure_ascii=False)
    raise UserError(
        "a value of an axis is a mapping", found=value, expected="a number, a word, a list",
        remedy="one axis for each of its keys",
    )  # fmt: skip
