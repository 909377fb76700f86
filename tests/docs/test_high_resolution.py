"""The examples in docs/high_resolution.md run, and say what the page says they do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from anchorformer.processing import AnchorFormerProcessor
from anchorformer.seen import Seen
from anchorformer.weights import load_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "high_resolution.md"
CORRELATION = {
    "_target_": "anchorformer.selectors.correlation.CorrelationSelectorConfig", "low_layer": 1, "deep_layer": -1,
    "tau": 0.995, "min_neighbours": 2,
}  # fmt: skip
TURNS = [("user", "<image>\nWhat is the total?")]


def run(example: str, folder: Path) -> dict[str, Any]:
    """The names that there are when the example has run."""
    names = {
        "model": load_model(folder, torch.float32).eval(), "processor": AnchorFormerProcessor.from_pretrained(folder),
        "images": [Image.effect_noise((60, 30), 80).convert("RGB")], "turns": TURNS,
    }  # fmt: skip
    exec(example, names)
    return names


@pytest.fixture(scope="module")
def examples() -> list[str]:
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(found) == 2
    return found


@pytest.mark.parametrize("tiling", [None, {"grids": [[1, 2], [2, 1]]}])
def test_images_are_looked_at_first_as_seen_does(
    examples: list[str], assemble_tiny: Callable[..., Path], tiling: dict[str, Any] | None
) -> None:
    names = run(examples[0], assemble_tiny(CORRELATION, tiling=tiling))
    answer = names["ids"][0, names["inputs"]["input_ids"].shape[1] :].tolist()
    expected = Seen(names["model"], names["processor"], names["images"]).generate(TURNS).tolist()
    assert answer[: len(expected)] == expected


def test_tiles_follow_from_the_images(examples: list[str], assemble_tiny: Callable[..., Path]) -> None:
    names = run(examples[1], assemble_tiny(tiling={"grids": [[1, 2], [2, 1]]}))
    assert names["inputs"]["tile_counts"] == [len(names["inputs"]["pixel_values"])]
    assert names["ids"].ndim == 2
