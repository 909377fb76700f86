"""Shows a trained model in a browser on this machine: `python -m anchorformer.demo [MODEL]`."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from anchorformer.errors import UserError, run_guarded


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m anchorformer.demo", description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="model folder or finished run (default: the newest run)")
    parser.add_argument("--images", type=Path, help="folder with images to choose from (default: the run's data)")
    parser.add_argument("--port", type=int, help="on 127.0.0.1 (default: a free one from 7860 on)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if importlib.util.find_spec("gradio") is None:
        raise UserError(
            "the demo's page is an extra", found="no gradio", expected="gradio",
            remedy="pip install 'anchorformer[demo]'; `python -m anchorformer.chat` needs nothing more",
        )  # fmt: skip
    from anchorformer.demo.examples import data_of, examples  # late: --help needs no torch
    from anchorformer.demo.session import Session
    from anchorformer.opening import newest_run, open_model

    opened = open_model(options.model or newest_run())
    folder = options.images or data_of(opened.folder.parent)
    if folder is not None and not folder.is_dir():
        raise UserError(
            "there is nothing to choose images from", found=f"--images {folder}", expected="a folder",
            remedy="check the path, or leave it out and upload images",
        )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="anchorformer-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # what was uploaded goes with the demo
        from anchorformer.demo.app import build, launch

        where = "GPU, bf16" if opened.model.device.type == "cuda" else "CPU, fp32"
        page = build(Session(opened), examples(folder) if folder else [], f"`{opened.folder}` on the {where}")
        print(f"{opened.folder}: {launch(page, options.port)} (Ctrl-C ends it)", flush=True)
        page.block_thread()


if __name__ == "__main__":
    run_guarded(main)
