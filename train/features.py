"""Which feature cache a run reads, and that it is filled before the ranks start."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from transformers import AutoProcessor

import anchorformer.auto  # noqa: F401 (makes the processor known to transformers)
from anchorformer.configuration import AnchorFormerConfig
from anchorformer.devices import Device
from anchorformer.kernels import backend
from data.counted import count
from data.features import FeatureCache
from data.fill import fill
from data.mixture import Mixture, open_sources
from train.config import RunConfig
from train.precision import choose_dtype


def cache_of(config: RunConfig, model: Path, dtype: torch.dtype, device: torch.device) -> FeatureCache | None:
    """The cache of a run that starts from the folder `model`, or None where its tower runs live.

    Args:
        dtype, device: that the run computes in and on.
    """
    root = config.data.feature_cache
    return None if root is None else FeatureCache(Path(root), model, dtype, device)


def own_cache(config: RunConfig, model: Path) -> FeatureCache | None:
    """The same, from a process that is none of the ranks."""
    is_cuda = config.hardware.device is not Device.cpu and torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    width = AnchorFormerConfig.from_pretrained(model).text_config.hidden_size
    return cache_of(config, model, choose_dtype(config.hardware.precision, device, width), device)


def fill_cache(config: RunConfig, model: Path) -> None:
    """Runs the tower, in this process, on the images of the run that no earlier run has had.

    Where the length of a record depends on what its images show, those are the images of all records, and what was
    chosen of them is counted: which records are trained on is only known afterwards.

    Raises:
        UserError: what `data.fill.fill` raises.
    """
    cache = own_cache(config, model)
    if cache is None:
        return
    backend.use(config.hardware.kernels.value)
    processor = AutoProcessor.from_pretrained(model, local_files_only=True)
    transform = processor.image_transform
    if cache.is_ragged:
        for source, _ in open_sources(config.data):
            count(source, cache, transform, on_bad_image=config.data.on_bad_image, num_workers=config.data.num_workers)
        return
    mixture = Mixture(config.data, processor.with_template(config.stage.template))
    fill(
        cache, mixture, range(len(mixture.tokens)), transform,
        made_of=hashlib.sha256(f"{mixture.images_digest} {transform}".encode()).hexdigest()[:16],
        on_bad_image=config.data.on_bad_image, num_workers=config.data.num_workers,
    )  # fmt: skip
