"""The loss curve of a tiny fp32 run through both stages is the one that is kept in tests/curves/.

A change that does not touch the maths leaves it as it is; one that does writes it anew, with its reason in the commit:
`ANCHORFORMER_WRITE_CURVES=1 pytest tests/train/test_curve.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.cases import ALIGN, FINETUNE
from train import rank
from train.distributed import alone
from train.run.folder import RunFolder

CURVE = Path(__file__).resolve().parent.parent / "curves" / "two_stages_fp32.json"
TOLERANCE = 1e-4
"""Relative: machines and versions of torch add fp32 numbers in other orders, and over the steps that grows a little."""


def losses_of(folder: RunFolder) -> list[float]:
    config = folder.read_config()
    rank.prepare_process(config)
    rank.run_rank(config, folder, alone())
    return [json.loads(line)["loss"] for line in folder.metrics.read_text().splitlines()]


def test_curve_is_kept(make_run: Callable[..., RunFolder]) -> None:
    align = make_run("align", ALIGN, stage__max_steps=12, stage__warmup_ratio=0.1)
    finetune = make_run("finetune", FINETUNE, stage__max_steps=12, stage__warmup_ratio=0.1)
    curves = {"align": losses_of(align)}
    (finetune.path / "start.txt").write_text(f"{align.model}\n")
    curves["finetune"] = losses_of(finetune)
    if os.environ.get("ANCHORFORMER_WRITE_CURVES"):
        CURVE.write_text(json.dumps(curves, indent=1) + "\n")
    kept = json.loads(CURVE.read_text())
    assert curves.keys() == kept.keys()
    for stage, losses in curves.items():
        assert losses == pytest.approx(kept[stage], rel=TOLERANCE), stage
        assert losses[-1] < losses[0], "the run learns"
