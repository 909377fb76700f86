"""From a sweep's grids to its trials: every point composed as a run is, and named by the hash of its configs."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from evals.__main__ import compose_config as compose_evals
from evals.run_keys import NOT_DECISIVE, without
from train.choices import StageName
from train.compose import compose
from train.config import RunConfig
from train.prepare import check_parts
from train.run.identity import hashed, numbers_digest
from train.sweep.config import SweepConfig, every_product
from train.sweep.trial import State, Step, Trial, TrialFolder
from train.sweep.words import key_of, words_for

TO_COME = "the align run of this trial"
"""What a finetune's `init_from` is while its trial is composed and hashed: the trial's own id is not known yet."""


@dataclass(frozen=True)
class Point:
    """One place in one grid, and the trial that it comes to."""

    grid: str
    values: dict[str, Any]
    trial: str


@dataclass(frozen=True)
class Plan:
    """All that a sweep consists of.

    Attributes:
        points: of all grids, in their order.
        trials: folder -> trial, each once; a shared stage 1 comes before the first trial that starts from it.
        configs: of the trials' runs, by folder and stage.
    """

    folder: Path
    points: list[Point]
    trials: dict[Path, Trial]
    configs: dict[Path, dict[StageName, RunConfig]]

    @property
    def of_points(self) -> dict[Path, Trial]:
        """Without the shared stages 1."""
        named = {point.trial for point in self.points}
        return {path: trial for path, trial in self.trials.items() if trial.id in named}


def plan(sweep: SweepConfig) -> Plan:
    """Composes and checks every point, before the first one is started.

    Raises:
        UserError: a point whose configs do not compose or whose parts do not fit, named; one for several nodes; an
            evaluation that does not compose.
    """
    folder = Path(sweep.output_root) / sweep.name
    made = Plan(folder, [], {}, {})
    _check_evals(sweep)

    @cache
    def composed(stage: StageName, words: tuple[str, ...]) -> RunConfig:
        return _config(stage, words, sweep)

    for grid, values in points(sweep):
        try:
            words = {stage: words_for(stage, sweep.overrides, values) for stage in sweep.stages}
            # Nothing else of a config depends on the seed, so that it is composed once for all of them.
            unseeded = {stage: tuple(word for word in words[stage] if key_of(word) != "seed") for stage in words}
            configs = {stage: replace(composed(stage, unseeded[stage]), seed=values["seed"]) for stage in words}
        except UserError as error:
            where = ", ".join(f"{axis}={value}" for axis, value in values.items())
            raise UserError(
                f"grid '{grid}', point {where}: {error.what}", found=error.found, expected=error.expected,
                remedy=error.remedy,
            ) from None  # fmt: skip
        trial = _add(made, sweep, values, words, configs)
        made.points.append(Point(grid, values, trial))
        _add_variants(made, sweep, grid, trial, configs[sweep.stages[-1]])
    return made


def _check_evals(sweep: SweepConfig) -> None:
    """Composes every evaluation, which would else be told of a mistake after hours of training."""
    last = [(*sweep.evals[sweep.stages[-1]], *words) for of in sweep.variants.values() for words in of.values()]
    for words in dict.fromkeys([*sweep.evals.values(), *last]):
        compose_evals(["model=m", "data.root=r", *words])


def points(sweep: SweepConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Grid and values of every point, the last axis fastest; seed by seed, so that half a sweep can be compared."""
    for seed in sweep.seeds:
        for grid, axes in every_product(sweep):
            columns = [value if isinstance(value, list) else [value] for value in axes.values()]
            for values in itertools.product(*columns):
                yield grid, {**dict(zip(axes, values, strict=True)), "seed": seed}


def config_hash(configs: Mapping[StageName, RunConfig]) -> str:
    """Hash of every value of the configs but those that decide nothing."""
    plain = {stage.value: without(hashed(config), NOT_DECISIVE) for stage, config in configs.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _config(stage: StageName, words: Sequence[str], sweep: SweepConfig) -> RunConfig:
    given = [f"stage={stage.value}", f"run={sweep.name}", "resume=auto", f"output_root={sweep.output_root}"]
    if _starts_from_align(stage, sweep):
        if any(key_of(word) == "init_from" for word in words):
            raise UserError(
                "init_from is given to finetune by the sweep", found="init_from", expected="align:init_from=...",
                remedy="or stages=[finetune], which starts from what init_from names",
            )  # fmt: skip
        given.append(f'init_from="{TO_COME}"')
    config = check_parts(compose([*given, *words]))
    if config.hardware.nodes > 1:
        raise UserError(
            "a trial is started on one node", found=f"hardware.nodes={config.hardware.nodes}", expected="1",
            remedy="hardware=a100x8, or each run by itself with launch/multinode.sh",
        )  # fmt: skip
    return config


def _add(
    made: Plan, sweep: SweepConfig, values: dict[str, Any], words: Mapping[StageName, Sequence[str]],
    configs: Mapping[StageName, RunConfig],
) -> str:  # fmt: skip
    """Adds the trial of a point, and the stage 1 that it starts from, where they are not there yet; returns its id."""
    start: Path | None = None
    stages = sweep.stages
    runs: dict[StageName, Path] = {}
    if len(stages) > 1:
        align = {StageName.align: configs[StageName.align]}
        digest = config_hash(align)
        start = made.folder / "shared" / digest[:12]
        runs[StageName.align] = start / StageName.align.value
        if start not in made.trials:
            point = {
                axis: value for axis, value in values.items() if not axis.startswith(f"{StageName.finetune.value}:")
            }
            made.trials[start] = _trial(digest, point, words, align, runs, sweep, None)
            made.configs[start] = align
        stages = (StageName.finetune,)
    digest = config_hash(configs)
    folder = made.folder / "trials" / digest[:12]
    if folder not in made.trials:
        own = {stage: configs[stage] for stage in stages}
        runs |= {stage: folder / stage.value for stage in stages}
        made.trials[folder] = _trial(digest, values, words, own, runs, sweep, start)
        made.configs[folder] = own
    return digest[:12]


def _add_variants(made: Plan, sweep: SweepConfig, grid: str, trial: str, config: RunConfig) -> None:
    """Adds to a trial what its grid wants to know beyond its own evaluation."""
    folder, last = made.folder / "trials" / trial, sweep.stages[-1]
    before = made.trials[folder]
    steps = [
        Step(
            name=" ".join(("evals", last.value, *sweep.evals[last], *words, name)),
            argv=(sys.executable, "-m", "evals", f"model={before.runs[last.value]}", f"data.root={config.data.root}",
                  *sweep.evals[last], *words, f"variant={name}"),
        )
        for name, words in sweep.variants.get(grid, {}).items()
    ]  # fmt: skip
    made.trials[folder] = replace(before, steps=(*before.steps, *(step for step in steps if step not in before.steps)))


def _trial(
    digest: str, values: dict[str, Any], words: Mapping[StageName, Sequence[str]],
    configs: Mapping[StageName, RunConfig], runs: Mapping[StageName, Path], sweep: SweepConfig, start: Path | None,
) -> Trial:  # fmt: skip
    steps: list[Step] = []
    for stage, config in configs.items():
        path = runs[stage]
        named = replace(config, run=str(path.relative_to(sweep.output_root)))
        if _starts_from_align(stage, sweep):
            named = replace(named, init_from=str(runs[StageName.align]))
        given = [f"stage={stage.value}", f"run={named.run}", "resume=auto", f"output_root={sweep.output_root}"]
        if named.init_from and _starts_from_align(stage, sweep):
            given.append(f"init_from={named.init_from}")
        if not any(key_of(word) == "tracker.group" for word in words[stage]):
            given.append(f"tracker.group={sweep.name}")
        train = (sys.executable, "-m", "train", "run", *given, *words[stage])
        steps.append(Step(name=stage.value, argv=train, run=str(path), numbers=numbers_digest(named)))
        asked = sweep.evals.get(stage)
        if asked:
            data = [f"data.root={config.data.root}"]
            if config.data.feature_cache is not None:
                data.append(f"data.feature_cache={config.data.feature_cache}")
            evals = (sys.executable, "-m", "evals", f"model={path}", *data, *asked)
            steps.append(Step(name=" ".join(("evals", stage.value, *asked)), argv=evals))
    overrides = list(dict.fromkeys(word for stage in configs for word in words[stage]))
    return Trial(
        id=digest[:12], point=values, overrides=tuple(overrides), config_hash=digest,
        runs={stage.value: str(path) for stage, path in runs.items()}, steps=tuple(steps),
        needs=str(start) if start else None,
    )  # fmt: skip


def _starts_from_align(stage: StageName, sweep: SweepConfig) -> bool:
    return stage is StageName.finetune and StageName.align in sweep.stages


def adopt(folder: Path, trial: Trial) -> Trial:
    """Writes what a trial is and keeps what has become of it; one that a process executes is left as it is."""
    place = TrialFolder(folder)
    before = place.read()
    if before is None:
        return place.write(trial)
    if place.is_held():
        return before
    state = place.state()
    if state is State.done and any(step.name not in before.finished for step in trial.steps):
        state = State.pending  # an evaluation more than before
    return place.write(
        replace(
            trial, state=state, started=before.started, ended=before.ended, exit_code=before.exit_code,
            seconds=before.seconds, finished=before.finished, reason=before.reason,
        )
    )  # fmt: skip
