"""Trials whose commands are one-liners, and `python -m tests.train.fake_trials FOLDER SLOTS`, a sweep of them."""

from __future__ import annotations

import sys
from pathlib import Path

from train.sweep.runner import Runner
from train.sweep.slots import Slot
from train.sweep.trial import State, Step, Trial, TrialFolder

SAY = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n')"


def say(file: Path, word: str) -> Step:
    """Adds a line to a file."""
    return Step(name=word, argv=(sys.executable, "-S", "-c", SAY, str(file), word))


def python(name: str, code: str, *arguments: object) -> Step:
    return Step(name=name, argv=(sys.executable, "-S", "-c", code, *map(str, arguments)))


def add(folder: Path, name: str, *steps: Step, needs: Path | None = None) -> Path:
    """Writes a pending trial below `folder` and returns its own."""
    path = folder / name
    TrialFolder(path).write(
        Trial(id=name, point={"name": name, "seed": 0}, overrides=(), config_hash=name, runs={}, steps=steps,
              needs=str(needs) if needs else None)
    )  # fmt: skip
    return path


def slots(number: int) -> list[Slot]:
    """Each with a card of its own, and the first core."""
    return [Slot((str(place),), frozenset((0,))) for place in range(number)]


def run(folder: Path, number: int = 1, retry_failed: bool = False) -> dict[str, State]:
    """Executes the trials below a folder, in the order of their names; the states by name."""
    trials = {path.parent: TrialFolder(path.parent).read() for path in sorted(folder.glob("*/trial.json"))}
    runner = Runner(trials, slots(number), retry_failed, lambda *_: None)  # type: ignore[arg-type]
    return {path.name: state for path, state in runner.run().items()}


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
