"""Writes a finished run's model to hand on: `export RUN OUT [what=model|connector] [dtype=bf16|fp16|fp32]`.

`what=model` (the default) is a folder that AutoProcessor and AutoModelForImageTextToText load where only `anchorformer`
is installed; `what=connector` the connector alone, which names and hashes the models that it belongs between. Either
has a model card written from the run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from anchorformer.errors import UserError
from train.run.folder import RunFolder

if TYPE_CHECKING:
    import torch

CHOICES = {"what": ("model", "connector"), "dtype": ("bf16", "fp16", "fp32")}
USAGE = "python -m train export RUN OUT [what=model|connector] [dtype=bf16|fp16|fp32]"


def main(arguments: list[str]) -> int:
    """
    Raises:
        UserError: a run that is not done, a connector whose bases have been trained too, something at OUT, or a disk
            that does not take it, of which nothing is left.
    """
    words = [word for word in arguments if "=" not in word]
    values = {"what": "model", "dtype": "bf16"} | dict(word.split("=", 1) for word in arguments if "=" in word)
    if len(words) != 2 or set(values) != set(CHOICES):
        raise UserError("export takes a run and a folder", found=" ".join(arguments) or "nothing", expected=USAGE,
                        remedy="e.g. python -m train export checkpoints/paper/finetune exported")  # fmt: skip
    for key, value in values.items():
        if value not in CHOICES[key]:
            raise UserError(f"unknown {key}", found=f"{key}={value}", expected=" or ".join(CHOICES[key]), remedy=USAGE)
    run, out = RunFolder(Path(words[0])), Path(words[1])
    run.read_config()
    if not run.done.is_file():
        raise UserError(
            f"{run.path} is not done", found=f"no {run.done.name}", expected="a run that has come to its end",
            remedy="finish it with resume=auto, then export",
        )  # fmt: skip
    import torch
    from safetensors import SafetensorError

    from anchorformer.model_folder import partial_of
    from train.writing import cannot_write

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[values["dtype"]]
    is_connector = values["what"] == "connector"
    try:
        _write(run, out, dtype, is_connector=is_connector)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial_of(out), ignore_errors=True)  # a full disk is not made fuller
        raise cannot_write(out, error, "the same command again") from None
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"exported {values['what']} in {values['dtype']}: {out} ({size / 1e6:.1f} MB)")
    return 0


def _write(run: RunFolder, out: Path, dtype: torch.dtype, *, is_connector: bool) -> None:
    from anchorformer.connector_folder import export_connector
    from anchorformer.export import export_model
    from train.card import base_names, card, trained_bases

    if is_connector:
        trained = trained_bases(run)
        if trained:
            raise UserError(
                "the connector alone is not what was trained", found=f"{', '.join(trained)} trained as well",
                expected="a run that trains the connector only",
                remedy="export what=model; or the connector of the align stage that it started from",
            )  # fmt: skip
        export_connector(run.model, out, dtype, base_names(run), card(run, is_connector=True))
    else:
        export_model(run.model, out, dtype, card(run, is_connector=False))
