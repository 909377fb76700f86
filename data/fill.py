"""Fills a feature cache: tiles that have no entry go through the vision tower once, before anyone reads them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.contracts import VisionFeatures
from anchorformer.errors import UserError
from anchorformer.images import ImageTransform, normalise
from anchorformer.parts import parse_parts, parse_tiling
from anchorformer.selectors.base import RaggedSelector
from anchorformer.views import build_selector
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
    for _ in filled(cache, pictured, numbers, transform, on_bad_image, num_workers):
        pass
    complete.touch()


class Tiles(NamedTuple):
    """The tiles of a record.

    Attributes:
        keys: of each image those of its tiles; none where the image is bad and that is no error.
        missing, tiles_B3HW: those that have no entry.
    """

    number: int
    keys: tuple[tuple[str, ...], ...]
    missing: list[str]
    tiles_B3HW: Tensor


def filled(
    cache: FeatureCache, pictured: Pictured, numbers: Sequence[int], transform: ImageTransform, on_bad_image: OnBad,
    num_workers: int = 0,
) -> Iterator[Tiles]:  # fmt: skip
    """Every record once, in any order; when the last one has come, all of their tiles have an entry.

    Args, Raises:
        as `fill`.
    """
    see, side = _seeing(cache)
    cache.describe(see(torch.zeros(1, 3, side, side, dtype=torch.uint8)))
    images = sum(len(pictured[number].images) for number in numbers)
    cache.check_room(images * max(transform.tiling.counts))

    start = hash((os.getpid(), len(numbers))) % max(1, len(numbers))
    loader = DataLoader(
        _Tiled(cache, pictured, transform, on_bad_image), batch_size=None,
        sampler=[*numbers[start:], *numbers[:start]], num_workers=num_workers,
        # A generator of its own: torch would draw the workers' base seed from the global one.
        generator=torch.Generator(),
    )  # fmt: skip
    group: dict[str, Tensor] = {}  # for the tower, none of them twice
    for found in tqdm(loader, "vision features", unit=" records", mininterval=1, delay=2):
        if isinstance(found, UserError):
            raise found
        group |= dict(zip(found.missing, found.tiles_B3HW, strict=True))
        while len(group) >= TILES_AT_ONCE:
            keys = list(group)[:TILES_AT_ONCE]
            cache.write(keys, see(torch.stack([group.pop(key) for key in keys])))
        yield found
    if group:
        cache.write(list(group), see(torch.stack(list(group.values()))))


def _seeing(cache: FeatureCache) -> tuple[Callable[[Tensor], VisionFeatures], int]:
    """From tiles to what is kept of them, and the side that tiles have."""
    config = AnchorFormerConfig.from_pretrained(cache.model)
    tower = load_tower(cache.model, cache.dtype).to(cache.device)
    rule, _ = parse_parts(config.selector, config.connector)
    shape = tower.num_tokens, tower.num_heads, tower.has_cls
    selector = build_selector(parse_tiling(config.tiling), rule, *shape) if rule.ragged else None

    @torch.inference_mode()
    def see(tiles_B3HW: Tensor) -> VisionFeatures:
        features: VisionFeatures = tower(normalise(tiles_B3HW.to(cache.device), config.image_mean, config.image_std))
        return selector.decided(features) if isinstance(selector, RaggedSelector) else features

    return see, tower.image_size


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


class _Tiled(Dataset[Tiles | UserError]):
    """Records as their tiles; a user's mistake is returned, as torch would bury it in a traceback."""

    def __init__(self, cache: FeatureCache, pictured: Pictured, transform: ImageTransform, on_bad_image: OnBad) -> None:
        self._cache, self._pictured, self._transform, self._on_bad_image = cache, pictured, transform, on_bad_image

    def __getitem__(self, number: int) -> Tiles | UserError:
        record = self._pictured[number]
        cut = []
        for ref in record.images:
            try:
                cut.append(self._transform.tiles([load_image(ref)]))
            except UserError as error:
                if self._on_bad_image is OnBad.error:
                    return UserError(
                        f"{record.id}: {error.what}", found=error.found, expected=error.expected, remedy=error.remedy
                    )
                cut.append(self._transform.tiles([]))
        tiles_B3HW = torch.cat([self._transform.tiles([]), *cut])
        keys = keys_of(tiles_B3HW)
        places = self._cache.missing(keys)
        left = iter(keys)
        by_image = tuple(tuple(next(left) for _ in tiles) for tiles in cut)
        return Tiles(number, by_image, [keys[place] for place in places], tiles_B3HW[places])
