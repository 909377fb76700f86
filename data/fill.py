"""Fills a feature cache: tiles that have no entry go through the vision tower once, before anyone reads them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.contracts import VisionFeatures
from anchorformer.errors import UserError
from anchorformer.images import ImageTransform, normalise
from anchorformer.weights import load_tower
from data.config import OnBad
from data.features import FeatureCache, keys_of
from data.images import load as load_image
from data.images import locate
from data.record import ImageRef

TILES_AT_ONCE = 64
"""Tiles that the tower reads together."""


class HasImages(Protocol):
    """A record or a question."""

    @property
    def id(self) -> str: ...
    @property
    def images(self) -> tuple[ImageRef, ...]: ...


class Pictured(Protocol):
    """Records or questions by number."""

    def __getitem__(self, number: int, /) -> HasImages: ...


def fill(
    cache: FeatureCache, pictured: Pictured, numbers: Sequence[int], transform: ImageTransform,
    *, made_of: str, on_bad_image: OnBad, num_workers: int = 0,
) -> None:  # fmt: skip
    """Runs the tower on every tile that has no entry yet; what an earlier, interrupted call has written stays.

    Several processes may fill one cache: each begins at a place of its own and passes over what the others have done.

    Args:
        pictured, numbers: the records or questions whose images are wanted.
        transform: image to tiles, the processor's.
        made_of: hash of which images these are; where the cache says that it holds them all, nothing is read.
        on_bad_image: as in training: an error, or left for the loader to skip and count.
        num_workers: processes that read images.

    Raises:
        UserError: a bad image, a disk without room, or a model folder whose tower cannot be loaded.
    """
    complete = cache.folder / f"complete-{made_of}"
    if complete.is_file():
        return
    config = AnchorFormerConfig.from_pretrained(cache.model)
    tower = load_tower(cache.model, cache.dtype).to(cache.device)

    @torch.inference_mode()
    def see(tiles_B3HW: Tensor) -> VisionFeatures:
        features: VisionFeatures = tower(normalise(tiles_B3HW.to(cache.device), config.image_mean, config.image_std))
        return features

    side = tower.image_size
    cache.describe(see(torch.zeros(1, 3, side, side, dtype=torch.uint8)))
    images = sum(len(pictured[number].images) for number in numbers)
    cache.check_room(images * max(transform.tiling.counts))

    start = hash((os.getpid(), len(numbers))) % max(1, len(numbers))
    loader = DataLoader(
        _MissingTiles(cache, pictured, transform, on_bad_image), batch_size=None,
        sampler=[*numbers[start:], *numbers[:start]], num_workers=num_workers,
        # A generator of its own: torch would draw the workers' base seed from the global one.
        generator=torch.Generator(),
    )  # fmt: skip
    for keys, batch_B3HW in _grouped(tqdm(loader, "vision features", unit=" records", mininterval=1, delay=2)):
        cache.write(keys, see(batch_B3HW))
    complete.touch()


def images_digest(pictured: Iterable[HasImages], transform: ImageTransform) -> str:
    """Which images these are, for `fill`: their files by size and time, or their bytes."""
    digest = hashlib.sha256(str(transform).encode())
    for item in pictured:
        for ref in item.images:
            place = locate(ref)
            if isinstance(place, Path):
                status = place.stat() if place.exists() else None
                place = f"{place} {status and (status.st_size, status.st_mtime_ns)}".encode()
            digest.update(hashlib.sha256(place).digest())
    return digest.hexdigest()[:16]


class _MissingTiles(Dataset[tuple[list[str], Tensor] | UserError]):
    """The tiles of a record that have no entry; a user's mistake is returned, as torch would bury it in a traceback."""

    def __init__(self, cache: FeatureCache, pictured: Pictured, transform: ImageTransform, on_bad_image: OnBad) -> None:
        self._cache, self._pictured, self._transform, self._on_bad_image = cache, pictured, transform, on_bad_image

    def __getitem__(self, number: int) -> tuple[list[str], Tensor] | UserError:
        record = self._pictured[number]
        images = []
        for ref in record.images:
            try:
                images.append(load_image(ref))
            except UserError as error:
                if self._on_bad_image is OnBad.error:
                    return UserError(
                        f"{record.id}: {error.what}", found=error.found, expected=error.expected, remedy=error.remedy
                    )
        tiles_B3HW = self._transform.tiles(images)
        keys = keys_of(tiles_B3HW)
        places = self._cache.missing(keys)
        return [keys[place] for place in places], tiles_B3HW[places]


def _grouped(results: Iterable[tuple[list[str], Tensor] | UserError]) -> Iterator[tuple[list[str], Tensor]]:
    """The records' tiles in groups for the tower, none of them twice in a group.

    Raises:
        UserError: the one that a data worker has met.
    """
    group: dict[str, Tensor] = {}
    for result in results:
        if isinstance(result, UserError):
            raise result
        group |= dict(zip(*result, strict=True))
        while len(group) >= TILES_AT_ONCE:
            keys = list(group)[:TILES_AT_ONCE]
            yield keys, torch.stack([group.pop(key) for key in keys])
    if group:
        yield list(group), torch.stack(list(group.values()))
