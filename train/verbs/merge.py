"""Puts a trained adapter into the weights of its base: `merge RUN OUT [base=FOLDER]`.

RUN is a finished run with `stage.lora`, or the adapter folder that it left. The base is compared by hash, and the model
at OUT is there only when it has answered eight prompts as the base with the adapter beside it does.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from anchorformer.errors import UserError
from train.run.folder import RunFolder

USAGE = "python -m train merge RUN OUT [base=FOLDER]"


def main(arguments: list[str]) -> int:
    """
    Raises:
        UserError: a run that is not done or has no adapter, another base, something at OUT, a proof that fails.
    """
    words = [word for word in arguments if "=" not in word]
    values = dict(word.split("=", 1) for word in arguments if "=" in word)
    if len(words) != 2 or values.keys() - {"base"}:
        raise UserError("merge takes a run and a folder", found=" ".join(arguments) or "nothing", expected=USAGE,
                        remedy="e.g. python -m train merge checkpoints/paper/finetune merged")  # fmt: skip
    run, out = RunFolder(Path(words[0])), Path(words[1])
    if run.config.is_file() and not run.done.is_file():
        raise UserError(
            f"{run.path} is not done", found=f"no {run.done.name}", expected="a run that has come to its end",
            remedy="finish it with resume=auto, then merge",
        )  # fmt: skip
    from anchorformer.export import refuse_existing
    from train.adapter import base_of, merge, prove

    refuse_existing(out)
    adapter = run.adapter if run.config.is_file() else run.path
    base = Path(values.get("base", base_of(adapter)))
    unproven = out.with_name(f".unproven-{out.name}")
    try:
        merge(adapter, base, unproven)
        proof = prove(adapter, base, unproven)
        unproven.rename(out)
    finally:
        shutil.rmtree(unproven, ignore_errors=True)
    print(
        f"merged {adapter} into {out}: fp32 logits of {proof.prompts} prompts differ by {proof.difference:.2g} at most "
        f"(allowed {proof.tolerance:.2g}; the adapter moves them by {proof.effect:.2g})"
    )
    return 0
