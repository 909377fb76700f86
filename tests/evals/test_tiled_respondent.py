"""A model with tiles is asked and scored like any other: answers and losses do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anchorformer.processing import AnchorFormerProcessor
from anchorformer.weights import load_model
from data.record import ImageRef
from evals.questions import Question
from evals.respondent import ModelRespondent


@pytest.mark.parametrize("select", ["tile", "image"])
def test_answers_and_losses_alone_and_together(assemble_tiny: Callable[..., Path], tmp_path: Path, select: str) -> None:
    folder = assemble_tiny(tiling={"grids": [[1, 2], [2, 2]], "select": select})
    model, processor = load_model(folder, torch.float32), AnchorFormerProcessor.from_pretrained(folder)
    questions = []
    for number, size in enumerate([(20, 60), (50, 50), None, (30, 90)]):
        images: tuple[ImageRef, ...] = ()
        if size is not None:
            pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{number}.png")
            images = (ImageRef(path=tmp_path / f"{number}.png"),)
        turns = (("user", "<image>\nwhat color?" if images else "what color?"),)
        questions.append(Question(id=str(number), images=images, turns=turns, references=("red",), meta={}))
    together, alone = (ModelRespondent(model, processor, size, {}) for size in (4, 1))
    assert together.answers(questions, 5) == alone.answers(questions, 5)
    for (loss, count), (expected, same) in zip(
        together.answer_losses(questions), alone.answer_losses(questions), strict=True
    ):
        assert count == same
        assert loss == pytest.approx(expected, rel=1e-5)
