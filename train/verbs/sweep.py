"""Executes the trials of a sweep that are not done: `sweep sweep=NAME [key=value ...] [key=one,other ...]`.

`dry_run=true` lists them instead, behind what the runs of the first come to; `retry_failed=true` starts failed ones
again. See docs/sweeps.md.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from anchorformer.devices import Device
from train.faults.interrupt import EXIT_CODE as INTERRUPTED
from train.preview import preview
from train.run import lock
from train.start import Topology, command
from train.sweep import slurm, summary
from train.sweep.config import Executor, SweepConfig
from train.sweep.points import Plan, adopt, plan
from train.sweep.runner import Runner
from train.sweep.slots import share_out
from train.sweep.trial import State, TrialFolder
from train.sweep.words import read


def main(arguments: list[str]) -> int:
    """
    Returns:
        0 where every trial is done (or submitted), 75 where some were interrupted, else 1.

    Raises:
        UserError: a point that does not fit, named, before any is started; another sweep at work in the same folder.
    """
    sweep = read(arguments)
    made = plan(sweep)
    if sweep.dry_run:
        print(previews(made))
        print(listing(sweep, made))
        return 0
    configs = [config for of_trial in made.configs.values() for config in of_trial.values()]
    slots = share_out(sweep, configs) if sweep.executor is Executor.local else []
    made.folder.mkdir(parents=True, exist_ok=True)
    with lock.held(made.folder):
        summary.write_definition(sweep, made, sys.argv)
        for path, trial in made.trials.items():
            adopt(path, trial)
        if sweep.executor is Executor.slurm:
            ranks = max(config.hardware.ranks for config in configs)
            is_on_cards = any(config.hardware.device is not Device.cpu for config in configs)
            jobs = slurm.submit(sweep, made.folder, made.trials, ranks, ranks if is_on_cards else 0)
            print(f"submitted: {', '.join(job.job_id for job in jobs) or 'nothing'}")
            waiting = [job for job in slurm.queued(made.trials).values() if job not in {job.job_id for job in jobs}]
            if waiting:
                print(f"in the queue already: {', '.join(waiting)}")
            return 0
        states = _run(sweep, made, Runner(made.trials, slots, sweep.retry_failed, lambda *_: None))
        return _conclude(made, list(states.values()), arguments)


def previews(made: Plan) -> str:
    """What the runs of the first point come to, as `python -m train run --dry-run` says it of each of them."""
    first = next(iter(made.of_points))
    needed = made.trials[first].needs
    folders = [*([Path(needed)] if needed else []), first]
    return "\n".join(
        preview(config, command(Path(made.trials[folder].runs[stage.value]), config, Topology())) + "\n"
        for folder in folders for stage, config in made.configs[folder].items()
    )  # fmt: skip


def listing(sweep: SweepConfig, made: Plan) -> str:
    """Every point with its trial and state, and the commands of one trial."""
    found = summary.rows(made)
    states = {path: TrialFolder(path).state() for path in made.trials}
    waiting = slurm.queued(made.trials) if sweep.executor is Executor.slurm else {}
    due = [path for path, state in states.items() if state is not State.done and path not in waiting
           and (state is not State.failed or sweep.retry_failed)]  # fmt: skip
    lines = [summary.table(found), "", f"{len(made.points)} points, {len(made.of_points)} trials, "
             f"{len(made.trials) - len(made.of_points)} stages 1; {len(due)} of these would run"
             + (f", {len(waiting)} are in Slurm's queue" if waiting else "")]  # fmt: skip
    for path in due[:1]:
        lines += ["", f"first {path}:", *(f"  {shlex.join(step.argv)}" for step in made.trials[path].steps)]
    return "\n".join(lines)


def _run(sweep: SweepConfig, made: Plan, runner: Runner) -> dict[Path, State]:
    named = made.of_points
    ended = (State.done, State.failed)
    already = sum(TrialFolder(path).state() is State.done for path in named)
    # Without a terminal there is no bar, and a line for every change has to do.
    with tqdm(total=len(named), initial=already, unit="trial", desc=sweep.name, disable=None) as bar:

        def tell(path: Path, state: State) -> None:
            if path in named and state in ended:
                bar.update()
            values = ", ".join(f"{axis.rpartition('.')[2]}={value}" for axis, value in made.trials[path].point.items())
            bar.write(f"{path.relative_to(made.folder)} {state.value}: {values}", file=sys.stdout)
            sys.stdout.flush()

        runner.on_change = tell
        return runner.run()


def _conclude(made: Plan, states: Sequence[State], arguments: Sequence[str]) -> int:
    found = summary.rows(made)
    summary.write(made, found)
    print(summary.table(found))
    print(f"written to {made.folder / summary.TABLE} and {summary.ROWS}")
    for text in summary.failures(made):
        print(text, file=sys.stderr)
    if all(state is State.done for state in states):
        return 0
    counts = {state.value: states.count(state) for state in State if state in states}
    print(", ".join(f"{number} {state}" for state, number in counts.items()), file=sys.stderr)
    if State.failed in states:
        again = shlex.join(["python", "-m", "train", "sweep", *arguments])
        print(f"failed trials are started again by `{again} retry_failed=true`", file=sys.stderr)
    return 1 if State.failed in states else INTERRUPTED
