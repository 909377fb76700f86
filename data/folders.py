"""Which folder a command means by `model=` or `processor=`: a run's model, or the folder itself."""

from __future__ import annotations

from pathlib import Path

from anchorformer.errors import UserError
from data.scan_config import ScanConfig

PROCESSOR = "processor_config.json"


def model_folder(name: str, key: str, *marks: str) -> Path:
    """The first folder of `name`/model and `name` itself that holds one of the files.

    Args:
        key: of the command line, for the message.
        marks: files that tell such a folder, the most telling one first.

    Raises:
        UserError: there is none; where runs lie below, they are named.
    """
    folder = Path(name)
    for mark in marks:
        for candidate in (folder / "model", folder):
            if (candidate / mark).is_file():
                return candidate
    runs = sorted(path.parents[1] for path in folder.glob(f"*/model/{marks[0]}"))
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    choices = [f"{key}={run}" for run in runs]
    raise UserError(
        f"no model in {name}",
        found=there or "an empty folder",
        expected=f"a finished run (with model/ in it) or a folder with {' or '.join(marks)}",
        remedy=f"pass {'one of ' if len(runs) > 1 else ''}{', '.join(choices)}"
        if runs
        else "finish the run, or pass the folder that `python -m anchorformer.assemble` wrote",
    )


def processor_folder(config: ScanConfig) -> Path:
    """The folder with the processor that a scan was given.

    Raises:
        UserError: there is none, or it holds a bare tokenizer and `num_image_tokens` or `template` are not set.
    """
    tokenizers = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    folder = model_folder(config.processor, "processor", PROCESSOR, *tokenizers)
    if not (folder / PROCESSOR).is_file() and (config.num_image_tokens is None or config.template is None):
        raise UserError(
            f"the processor's folder holds no {PROCESSOR}",
            found=f"num_image_tokens={config.num_image_tokens}, template={config.template}",
            expected="both of them, with a bare tokenizer",
            remedy="add num_image_tokens=145 template=v1, or name a model folder",
        )
    return folder
