"""Images per second and core from JPEG files to what the device gets: normalised floats, against bytes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from anchorformer.configuration import CLIP_MEAN, CLIP_STD
from anchorformer.images import ImageTransform, normalise
from bench.runner import Row, Size, cpu_seconds, error
from data.images import load
from data.record import Record
from data.sources.llava import LlavaConfig

GOAL = 180.0
"""Images per second and core."""


def rows(size: Size) -> Iterator[Row]:
    images, sides = (2, [28]) if size is Size.tiny else (4, [336])
    if size is Size.full:
        sides += [672, 1008]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        megabytes = _write(root, images)
        source = LlavaConfig(annotations="records.json").open("bench", root, root / "cache")
        records = [source[index] for index in range(len(source))]
        for side in sides:
            transform = ImageTransform.for_statistics(side, CLIP_MEAN)

            def old(transform: ImageTransform = transform) -> Tensor:
                return torch.stack([published(record, transform) for record in records])

            def new(transform: ImageTransform = transform) -> Tensor:
                return torch.cat([transform.tiles([load(ref) for ref in record.images]) for record in records])

            tiles = new()
            difference = error(normalise(tiles, CLIP_MEAN, CLIP_STD), old())
            seconds = cpu_seconds({"old": old, "new": new}, repeats=3 if size is Size.tiny else 30)
            yield Row(
                name=f"loader, 640 x 480 JPEG to {side} x {side}", unit="images/s", old=images / seconds["old"],
                new=images / seconds["new"], equal=difference < 1e-6, goal=GOAL if side == 336 else None,
                note=f"one core; files of {megabytes / images * 1e3:.0f} kB; old: normalised floats on the host; "
                f"equal: the same values after normalisation on the device ({difference:.0e})",
            )  # fmt: skip


def published(record: Record, transform: ImageTransform) -> Tensor:
    """The same padding and resizing (LLaVA's order), then rescaling and normalising on the host, as its processor."""
    tile = transform(load(record.images[0])).permute(1, 2, 0).numpy()
    scaled = tile.astype(np.float32) * np.float32(1 / 255)
    normalised = (scaled - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1)))


def _write(root: Path, images: int) -> float:
    """Records and blurred noise, which compresses as photographs do; returns megabytes of JPEG."""
    generator = np.random.default_rng(0)
    records, size = [], 0
    for number in range(images):
        noise = generator.integers(0, 256, (480, 640, 3), dtype=np.uint8)
        path = root / f"{number}.jpg"
        Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1)).save(path, quality=90)
        size += path.stat().st_size
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Noise."}]
        records.append({"id": str(number), "image": path.name, "conversations": turns})
    (root / "records.json").write_text(json.dumps(records))
    return size / 1e6
