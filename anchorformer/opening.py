"""Opens a trained model to talk to: which folder is meant, on which device, in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

import anchorformer.auto  # noqa: F401  (makes the processor known to AutoProcessor)
from anchorformer import hub
from anchorformer.errors import UserError
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.weights import check_folder, load_model

CHECKPOINTS = Path("checkpoints")
"""Where runs lie, below the folder that a command is given in."""
DONE, MODEL = "DONE", "model"
"""What a finished run holds: the mark of its end, and the model folder."""
CAPTIONS = "plain"
"""The template that writes no question down."""


@dataclass(frozen=True)
class Opened:
    """A model that answers, with the folder it came from."""

    folder: Path
    model: AnchorFormerForConditionalGeneration
    processor: AnchorFormerProcessor


def open_model(path: Path) -> Opened:
    """The model of a folder or of a finished run: in bf16 on a GPU where there is one, else in fp32.

    Raises:
        UserError: there is none, it is damaged, or its template writes no question down.
    """
    folder = path / MODEL if (path / MODEL).is_dir() else path
    if not folder.is_dir():
        raise UserError(
            f"{path} is no model", found="no such folder", expected="a model folder, or a finished run",
            remedy="check the path; runs lie below checkpoints/",
        )  # fmt: skip
    check_folder(folder)
    processor: AnchorFormerProcessor = hub.load("processor", folder, AnchorFormerProcessor.from_pretrained)
    if processor.template == CAPTIONS:
        raise UserError(
            f"{folder} cannot be asked anything", found=f"template={CAPTIONS}, which writes no question down",
            expected="a model of the second stage", remedy="name the run that came of stage=finetune",
        )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    model = load_model(folder, torch.bfloat16 if on_gpu else torch.float32)
    return Opened(folder, model.to("cuda" if on_gpu else "cpu").eval(), processor)


def newest_run(checkpoints: Path = CHECKPOINTS) -> Path:
    """The run that finished last, of those whose model can be asked.

    Raises:
        UserError: there is none.
    """
    finished = [done for done in checkpoints.rglob(DONE) if _answers(done.parent / MODEL)]
    if not finished:
        raise UserError(
            "there is no model to show", found=f"no finished run of the second stage below {checkpoints}/",
            expected="one, or a model folder on the command line",
            remedy="run `make train` (the mini world, on a CPU), or name a model folder",
        )  # fmt: skip
    return max(finished, key=lambda done: done.stat().st_mtime).parent


def _answers(folder: Path) -> bool:
    path = folder / "processor_config.json"
    return path.is_file() and hub.read_object(path).get("template") != CAPTIONS
