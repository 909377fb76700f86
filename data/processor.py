"""The processor that records are scanned with: a model's own, or one around a bare tokenizer."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from anchorformer.hub import load
from anchorformer.images import ImageTransform
from anchorformer.processing import AnchorFormerProcessor
from data.folders import PROCESSOR
from data.scan_config import ScanConfig


def open_processor(config: ScanConfig, folder: Path) -> AnchorFormerProcessor:
    """The processor of a folder that `data.folders.processor_folder` found.

    Raises:
        UserError: no tokenizer in it or a damaged one, or a template that does not fit it.
    """
    if (folder / PROCESSOR).is_file():
        processor = load("processor", folder, AnchorFormerProcessor.from_pretrained, local_files_only=True)
        return processor.with_template(config.template) if config.template else processor
    assert config.num_image_tokens is not None
    assert config.template is not None
    tokenizer = load("tokenizer", folder, AutoTokenizer.from_pretrained, local_files_only=True)
    # Pixels are not looked at here, so the size of the tiles does not matter.
    transform = ImageTransform(image_size=32, fill_rgb=(0, 0, 0))
    return AnchorFormerProcessor(transform, tokenizer, config.num_image_tokens, template=config.template)
