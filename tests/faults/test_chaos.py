"""Both stages under kill -9 after kill -9, drawn by a seed: they end as if there had been none, to the bit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.chaos_rank import AT_END, BEHIND_COMPLETE, IN_SAVE, IN_STEPS, PRUNING, START_UP
from tests.faults.conftest import Launch
from tests.faults.planted import run_whole
from tests.train.cases import ALIGN, FINETUNE
from tests.train.ranks import Ranks
from train.run.folder import RunFolder

MakeRun = Callable[..., RunFolder]
CHAOS = Path(__file__).with_name("chaos_rank.py")
INTERVAL = 2
"""Steps between checkpoints, and so the most that a kill may cost."""
KEEP = 2
AGAIN = 0.15
"""Share of the kills behind which the next start is killed as well."""


def draw(kills: int, seed: int) -> list[dict[str, Any]]:
    """One kill in each interval, and one in the export; where one lies behind COMPLETE, the next interval is spared.

    Kills of a start that follows one come on top: they cost no step.
    """
    random_numbers = random.Random(seed)
    drawn: list[dict[str, Any]] = []
    interval = 0
    while len(drawn) < kills - 1:
        point = random_numbers.choice(IN_STEPS + IN_SAVE + ((PRUNING,) if interval >= KEEP else ()))
        last = (interval + 1) * INTERVAL
        step = last if point in (*IN_SAVE, PRUNING) else random_numbers.randint(last - INTERVAL + 1, last)
        rank = 0 if point in BEHIND_COMPLETE else random_numbers.randrange(2)
        drawn.append({"rank": rank, "point": point, "step": step})
        interval += 2 if point in BEHIND_COMPLETE else 1
        if len(drawn) < kills - 1 and random_numbers.random() < AGAIN:
            drawn.append({"rank": random_numbers.randrange(2), "point": random_numbers.choice(START_UP), "step": 0})
    return [*drawn, {"rank": random_numbers.randrange(2), "point": AT_END, "step": (interval + 1) * INTERVAL}]


def stages(
    make_run: MakeRun, kind: str, steps: tuple[int, int], zero: int, restarts: int
) -> tuple[RunFolder, RunFolder]:
    """Align, and a finetune that starts from what it leaves."""
    changes = {
        "engine": "deepspeed", "zero__stage": zero, "hardware__ranks": 2, "hardware__micro_batch": 1,
        "checkpoint__every": INTERVAL, "checkpoint__keep": KEEP, "hardware__max_restarts": restarts,
    }  # fmt: skip
    align = make_run(f"{kind} align", ALIGN, **changes, stage__max_steps=steps[0])
    finetune = make_run(f"{kind} finetune", FINETUNE, **changes, stage__max_steps=steps[1])
    (finetune.path / "start.txt").write_text(f"{align.model}\n")
    return align, finetune


def record(folder: RunFolder) -> list[dict[str, Any]]:
    return [{**json.loads(line), "time": None} for line in folder.metrics.read_text().splitlines()]


@pytest.mark.parametrize(
    ("kills", "zero"),
    [
        pytest.param(3, 2, marks=pytest.mark.faults),
        pytest.param(50, 2, marks=pytest.mark.chaos),
        pytest.param(20, 3, marks=pytest.mark.chaos),
    ],
)
def test_killed_again_and_again(
    make_run: MakeRun, launch: Launch, pair: Ranks, tmp_path: Path, kills: int, zero: int
) -> None:
    schedules = [draw(kills // 2, seed=kills), draw(kills - kills // 2, seed=kills + 1)]
    lengths = schedules[0][-1]["step"], schedules[1][-1]["step"]
    whole = stages(make_run, "whole", lengths, zero, 0)
    for run in whole:
        pair.run(run_whole, folder=str(run.path))
    killed = stages(make_run, "killed", lengths, zero, kills)
    for name, run, schedule in zip(("align", "finetune"), killed, schedules, strict=True):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(schedule))
        launch(run, program=[str(CHAOS), str(path)]).ends_with(0, seconds=60 * (len(schedule) + 1))
        assert len(list(tmp_path.glob(f"{name}-*.done"))) == len(schedule), "every kill has happened"
        starts = [int(line) for line in path.with_suffix(".starts").read_text().splitlines()]
        assert starts[0] == 0
        in_steps = [kill for kill in schedule if kill["point"] not in START_UP]
        assert len(starts) == 1 + len(in_steps)
        for kill, start in zip(in_steps, starts[1:], strict=True):
            taken = kill["step"] - (kill["point"] in IN_STEPS)
            assert 0 <= taken - start <= INTERVAL, (kill, start)
    for run, other in zip(killed, whole, strict=True):
        assert run.done.exists()
        assert record(run) == record(other)
        files = sorted(path.name for path in other.model.glob("*.safetensors"))
        for name in files:
            assert (run.model / name).read_bytes() == (other.model / name).read_bytes(), name
