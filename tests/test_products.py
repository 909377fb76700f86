"""The complete products: `make train` with the margins it promises, and both stages on real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.products import CHART, DOC, SCENE, launch, margins, steps

pytestmark = [pytest.mark.slow, pytest.mark.beside("train")]


def test_the_mini_world_means_something(runs: Path) -> None:
    found = margins(runs)
    assert found["miniworld_caption"] >= 0.5, found
    assert found[SCENE] >= 0.12, found
    assert found[CHART] >= 0.15, found
    assert found[DOC] >= 0.20, found


@pytest.mark.usefixtures("runs")  # its backbones are the ones that real_tiny starts from
def test_two_stages_on_real_files(realdata_root: Path, tmp_path: Path) -> None:
    launch("two_stage.sh", "real", "experiment=real_tiny", f"data.root={realdata_root}", f"output_root={tmp_path}",
           f"data.cache_dir={tmp_path}/cache", "stage.epochs=null", "stage.max_steps=20")  # fmt: skip
    for stage in ("align", "finetune"):
        records = steps(tmp_path / "real" / stage)
        assert len(records) == 20
        assert records[-1]["loss"] < records[0]["loss"]
    sources = {sample.split("/")[0] for step in steps(tmp_path / "real" / "finetune") for sample in step["sample_ids"]}
    config = json.dumps(sorted(sources))
    for family in ("chart", "doc", "instruct"):
        assert family in config, config
