"""Whatever a model is made of, a run can look at its anchors: sweeps do so behind the last step of every trial."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from anchorformer.weights import load_model
from tests.test_every_combination import CONNECTORS, SELECTORS
from tests.train.cases import FINETUNE
from train.distributed import alone
from train.faults.progress import Progress
from train.observe.health import Health
from train.observe.validation import SharedRespondent, looking
from train.run.folder import RunFolder

MakeRun = Callable[..., RunFolder]
ERAM_V = {"_target_": "anchorformer.integrations.eram_v.EramVConfig", "layers": [1]}
MODELS = [
    *({"connector": connector} for connector in CONNECTORS.values()),
    *({"connector": CONNECTORS["anchor_former"], "selector": one} for one in SELECTORS.values()),
    {"connector": CONNECTORS["identity"], "selector": SELECTORS["average"], "integration": ERAM_V},
]
NAMES = [*CONNECTORS, *SELECTORS, "eram_v"]
KINDS = ("anchor_former", "qformer", "resampler_mqt", "anchor", "mean_pool", "correlation", "eram_v")
"""One of each way to look and to choose."""


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(parts, id=name, marks=[] if name in KINDS else pytest.mark.slow)
        for name, parts in zip(NAMES, MODELS, strict=True)
    ],
)
def test_its_anchors_are_drawn(
    make_run: MakeRun, assemble_tiny: Callable[..., Path], tmp_path: Path, parts: dict[str, Any]
) -> None:
    config = make_run("looked", FINETUNE, health__every=1, health__images=2, health__max_new_tokens=2).read_config()
    start, world = assemble_tiny(**parts), alone()
    model, processor = load_model(start, torch.float32), AutoProcessor.from_pretrained(start).with_template("chat")
    with looking(model):
        respondent = SharedRespondent(model, processor, 2, world, Progress(), is_sharded=False)
        seen = Health(config, world, tmp_path / "media").look(5, model, respondent)
    assert seen["images"] == 2
    folder = tmp_path / "media" / "step-00000005"
    told = json.loads((folder / "answers.json").read_text())
    assert all(Image.open(folder / name).width >= 300 for one in told for name in one["overlays"])
    assert [len(one["overlays"]) for one in told] == [1, 1]
