"""Looks after a run's checkpoints: `checkpoint verify|list|prune|convert RUN`."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from anchorformer.errors import UserError
from train.run.folder import RunFolder
from train.run.lock import held


def main(arguments: list[str]) -> int:
    """Runs one of the actions on a run folder.

    Raises:
        UserError: an unknown action, other than one run folder, or what the action raises.
    """
    usage = f"python -m train checkpoint {'|'.join(ACTIONS)} RUN"
    if len(arguments) < 2 or arguments[0] not in ACTIONS:
        near = difflib.get_close_matches(arguments[0], ACTIONS, n=1) if arguments else []
        raise UserError(
            "checkpoint takes an action and a run", found=" ".join(arguments) or "nothing",
            expected=f"'{near[0]}'?" if near else usage, remedy=usage,
        )  # fmt: skip
    return ACTIONS[arguments[0]](RunFolder(Path(arguments[1])), arguments[2:])


def verify(folder: RunFolder, rest: Sequence[str]) -> int:
    """Reads every file that has a hash; 1 where one is not as the run left it."""
    from train.run.verify import verify as look

    _no_more(rest)
    findings = []
    for finding in look(folder):
        findings.append(finding)
        print(f"{'ok     ' if finding.problem is None else 'BROKEN '} {finding.what}"
              f"{'' if finding.problem is None else f': {finding.problem}'}", flush=True)  # fmt: skip
    broken = sum(finding.problem is not None for finding in findings)
    print(f"{broken} of {len(findings)} broken" if broken else f"all {len(findings)} as the run left them")
    return 1 if broken else 0


def listing(folder: RunFolder, rest: Sequence[str]) -> int:
    """One line for everything below state/, by names and sizes; `verify` reads contents."""
    from train.checkpoint import retention, state
    from train.engine.saved import Form, Saved

    _no_more(rest)
    folder.read_config()
    for found in retention.listing(folder.state):
        words = f"{found.folder.name:36} {found.bytes / 1e6:>10.1f} MB  {_age(found.folder)}"
        if found.problem is not None:
            print(f"{words}  incomplete: {found.problem}")
        elif found.folder.name.startswith(retention.UNIVERSAL):
            print(f"{words}  conversion for any number of ranks")
        else:
            saved, step = Saved.read(found.folder), state.read(found.folder)["step"]
            readers = "any number of" if saved.form is Form.whole else str(saved.ranks)
            print(f"{words}  step {step}, for {readers} rank(s)")
    return 0


def prune(folder: RunFolder, rest: Sequence[str]) -> int:
    """Deletes what a resumption does not need: all but the newest complete ones, and everything that is not one."""
    from train.checkpoint import retention

    config = folder.read_config()
    keep = _keep(rest, config.checkpoint.keep)
    with held(folder.path):
        for path in retention.prune_all(folder.state, keep):
            print(f"deleted {path.name}")
    return 0


def convert(folder: RunFolder, rest: Sequence[str]) -> int:
    """Makes the newest complete checkpoint readable on any number of ranks."""
    from train.checkpoint import find, reshape
    from train.distributed import alone
    from train.engine.saved import Form, Saved

    _no_more(rest)
    folder.read_config()
    with held(folder.path):
        position = find(folder.state, "auto", alone())
        if position is None:
            print("there is no checkpoint")
        elif Saved.read(position).form is Form.whole:
            print(f"{position.name} is whole: any number of ranks reads it")
        else:
            print(f"converted: {reshape.ensure(position)}")
    return 0


ACTIONS: dict[str, Callable[[RunFolder, Sequence[str]], int]] = {
    "verify": verify, "list": listing, "prune": prune, "convert": convert,
}  # fmt: skip


def _keep(words: Sequence[str], default: int) -> int:
    for word in words:
        key, _, value = word.partition("=")
        if key != "keep" or not value.isdecimal() or int(value) < 1 or len(words) > 1:
            raise UserError(
                "prune takes one number", found=" ".join(words), expected="keep=1 or more", remedy="e.g. keep=2"
            )
        return int(value)
    return default


def _no_more(rest: Sequence[str]) -> None:
    if rest:
        raise UserError("that is too much", found=" ".join(rest), expected="one run folder", remedy="leave it out")


def _age(path: Path) -> str:
    hours = (time.time() - path.stat().st_mtime) / 3600
    return f"{hours:6.1f} h old" if hours < 48 else f"{hours / 24:6.1f} d old"
