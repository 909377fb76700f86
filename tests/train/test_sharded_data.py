"""Two real ranks train on a sharded copy behind HTTP: the losses of the files, also where a run changes over midway."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.shards.config import ShardConfig
from data.shards.write import write
from tests.data.servers import serving
from tests.train.cases import FINETUNE
from tests.train.conftest import launch_again
from tests.train.ranks import Ranks
from tests.train.test_resume import record, run_until
from train.run.folder import RunFolder

MakeRun = Callable[..., RunFolder]


def data_of(run: RunFolder, **values: Any) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(run.config.read_text())["data"]
    return {**data, **values}


@pytest.mark.slow
def test_losses_are_those_of_the_files(pair: Ranks, make_run: MakeRun, tmp_path: Path) -> None:
    changes = {
        "engine": "deepspeed", "zero__stage": 2, "hardware__ranks": 2, "hardware__micro_batch": 1,
        "stage__max_steps": 8, "checkpoint__every": 2, "resume": "auto",
    }  # fmt: skip
    native, sharded, changed = (make_run(name, FINETUNE, **changes) for name in ("native", "sharded", "changed"))
    copy = tmp_path / "copy"
    write(ShardConfig(data=native.read_config().data, out=str(copy)))
    pair.run(run_until, folder=str(native.path))
    with serving(copy) as server:
        # A machine of its own: nothing of the files, nor of what was read of them, is within its reach.
        elsewhere = {"root": str(tmp_path / "nothing"), "cache_dir": str(tmp_path / "cache"), "shards": server.url}
        launch_again(sharded, data=data_of(sharded, **elsewhere))
        pair.run(run_until, folder=str(sharded.path))
        pair.run(run_until, folder=str(changed.path), stop_at=6)
        launch_again(changed, data=data_of(changed, shards=server.url))
        pair.run(run_until, folder=str(changed.path))
        asked = [span for _, name, span in server.asked if "images-" in name and span]
    assert record(sharded) == record(native)
    assert record(changed) == record(native)
    assert len(asked) > 30, "images came by range"
