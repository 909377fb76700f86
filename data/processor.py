"""The processor that records are scanned with: a model's own, or one around a bare tokenizer."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from anchorformer.errors import UserError
from anchorformer.hub import load
from anchorformer.images import ImageTransform
from anchorformer.processing import AnchorFormerProcessor
from data.folders import PROCESSOR
from data.scan_config import ScanConfig


def open_processor(config: ScanConfig, folder: Path) -> AnchorFormerProcessor:
    """The processor of a folder that `data.folders.processor_folder` found.

    Raises:
        UserError: no tokenizer in it or a damaged one, a template that does not fit it, or a model whose samples have
            lengths that depend on what it sees.
    """
    if (folder / PROCESSOR).is_file():
        processor = load("processor", folder, AnchorFormerProcessor.from_pretrained, local_files_only=True)
        if processor.needs_token_counts:
            raise UserError(
                "how long a sample is depends on what the model sees, and a scan runs no model",
                found=f"num_image_tokens=null in {folder / PROCESSOR}",
                expected="a number of embeddings that is known without looking",
                remedy="scan with the language model's folder: processor=FOLDER num_image_tokens=200 template=v1",
            )  # fmt: skip
        return processor.with_template(config.template) if config.template else processor
    assert config.num_image_tokens is not None
    assert config.template is not None
    tokenizer = load("tokenizer", folder, AutoTokenizer.from_pretrained, local_files_only=True)
    # Pixels are not looked at here, so the size of the tiles does not matter.
    transform = ImageTransform(image_size=32, fill_rgb=(0, 0, 0))
    return AnchorFormerProcessor(transform, tokenizer, config.num_image_tokens, template=config.template)
