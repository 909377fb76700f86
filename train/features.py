"""Which feature cache a run reads, and that it is filled before the ranks start."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from transformers import AutoProcessor

import anchorformer.auto  # noqa: F401 (makes the processor known to transformers)
from anchorformer.configuration import AnchorFormerConfig
from anchorformer.kernels import backend
from data.features import FeatureCache
from data.fill import fill
from data.mixture import Mixture
from train.config import Device, RunConfig
from train.precision import choose_dtype


def cache_of(config: RunConfig, model: Path, dtype: torch.dtype, device: torch.device) -> FeatureCache | None:
    """The cache of a run that starts from the folder `model`, or None where its tower runs live.

    Args:
        dtype, device: that the run computes in and on.
    """
    root = config.data.feature_cache
    return None if root is None else FeatureCache(Path(root), model, dtype, device)


def fill_cache(config: RunConfig, model: Path) -> None:
    """Runs the tower, in this process, on the images of the run that no earlier run has had.

    Raises:
        UserError: what `data.fill.fill` raises.
    """
    is_cuda = config.hardware.device is not Device.cpu and torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    width = AnchorFormerConfig.from_pretrained(model).text_config.hidden_size
    cache = cache_of(config, model, choose_dtype(config.hardware.precision, device, width), device)
    if cache is None:
        return
    backend.use(config.hardware.kernels.value)
    processor = AutoProcessor.from_pretrained(model, local_files_only=True)
    mixture = Mixture(config.data, processor.with_template(config.stage.template))
    transform = processor.image_transform
    fill(
        cache, mixture, range(len(mixture.tokens)), transform,
        made_of=hashlib.sha256(f"{mixture.images_digest} {transform}".encode()).hexdigest()[:16],
        on_bad_image=config.data.on_bad_image, num_workers=config.data.num_workers,
    )  # fmt: skip
