"""From a file to the tiles a vision tower reads: opening an image safely, padding, cutting and resizing it."""

from __future__ import annotations

import errno
import functools
import io
import logging
import os
import stat
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anchorformer.errors import UserError
from anchorformer.tiling import UNTILED, Size, Tiling

log = logging.getLogger(__name__)

MAX_PIXELS = 2**27
"""Largest padded square that is built (a side of 11,585 pixels, 400 MB while it is being resized)."""

MAX_BYTES = 8 * MAX_PIXELS
"""Largest file that is read: that many pixels with four channels of 16 bits, not compressed at all."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the file begins that a clone without git-lfs has in place of another."""

# Only raster formats decoded inside this process: Pillow would hand EPS to an external interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

BAD_FILE = frozenset({
    errno.ENOENT, errno.EISDIR, errno.ELOOP, errno.ENOTDIR, errno.EINVAL, errno.EFBIG, errno.ENAMETOOLONG, errno.EACCES,
    errno.EPERM,
})  # fmt: skip
"""What the system says of a path that holds no readable image; EIO, ESTALE, EMFILE and the like say nothing of it."""

WAITS = (0.1, 0.5, 2.0)
"""Seconds before each further try to read a file where the fault may be the disk's, the network's or this machine's."""

# What Pillow's decoders raise on broken files, besides its own errors (which are OSErrors).
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


def read_image(path: Path) -> bytes:
    """The encoded bytes of an image file.

    Raises:
        OSError: one of BAD_FILE (no such file, a folder, a pipe, more than MAX_BYTES), or what remained after WAITS.
    """
    for wait in WAITS:
        try:
            return _read(path)
        except OSError as error:
            if error.errno in BAD_FILE:
                raise
            log.warning("%s: %s; trying again", path, error.strerror or error)
            time.sleep(wait)
    return _read(path)


def _read(path: Path) -> bytes:
    _check_file(path)
    return path.read_bytes()


def _check_file(path: Path) -> None:
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file")
    if status.st_size > MAX_BYTES:
        raise OSError(errno.EFBIG, f"{status.st_size} bytes")


def open_image(source: Path | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens and decodes one image; its size is checked from the header, before anything is decoded.

    Args:
        source: a file, or the encoded bytes of one.
        name: how messages call the image; the path where none is given.
        max_pixels: most pixels of the square that the image is padded to.

    Raises:
        UserError: no such file, empty, not an image, broken off, or larger than `max_pixels`.
        OSError: the file could not be read for a reason that is none of its own; such an image is not a bad one.
    """
    name = name or (str(source) if isinstance(source, Path) else "an image given as bytes")
    try:
        content = read_image(source) if isinstance(source, Path) else source
    except OSError as error:
        if error.errno not in BAD_FILE:
            error.filename = name
            raise
        raise UserError(
            f"{name}: cannot be read", found=error.strerror or str(error), expected="an image file",
            remedy="check the path and data.root; `python -m data scan` lists all missing images",
        ) from None  # fmt: skip
    if not content:
        raise UserError(
            f"{name}: the file is empty", found="0 bytes", expected=f"an image ({', '.join(FORMATS)})",
            remedy="fetch the file again",
        )  # fmt: skip
    if content.startswith(LFS_POINTER):
        raise UserError(
            f"{name}: the file is not there yet", found="a git-LFS pointer", expected="the image that it stands for",
            remedy="fetch the images with `git lfs pull`",
        )  # fmt: skip
    try:
        image = Image.open(io.BytesIO(content), formats=_formats())
        _check_size(image.size, name, max_pixels)
        image.load()
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error), max_pixels) from None
    except DECODING_ERRORS as error:
        raise UserError(
            f"{name}: cannot be decoded", found=f"{len(content)} bytes: {type(error).__name__}: {error}",
            expected=f"a complete image ({', '.join(FORMATS)})",
            remedy="fetch the file again, or leave such samples out with data.on_bad_image=skip",
        ) from None  # fmt: skip
    return image


def image_size(source: Path | bytes) -> Size | None:
    """What the header alone says; None of what is no readable image, which `open_image` explains.

    Raises:
        OSError: the file could not be read for a reason that is none of its own.
    """
    try:
        if isinstance(source, Path):
            _check_file(source)
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=_formats()) as header:
            return header.size
    except Image.DecompressionBombError:
        return None
    except DECODING_ERRORS as error:
        # Pillow's own errors are OSErrors without a number.
        if isinstance(error, OSError) and error.errno is not None and error.errno not in BAD_FILE:
            raise
        return None


@functools.cache
def _formats() -> tuple[str, ...]:
    # A Pillow built without one of the optional libraries raises KeyError for a format it does not know.
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    # The square counts, not the image: a strip of 100,000 x 1 pixels is small on disk and in memory, its square is not.
    if max(size) ** 2 > max_pixels:
        raise _too_large(name, f"{size[0]} x {size[1]} pixels", max_pixels)


def _too_large(name: str, found: str, max_pixels: int) -> UserError:
    return UserError(
        f"{name}: the image is too large", found=found, expected=f"no side above {int(max_pixels**0.5)} pixels",
        remedy="shrink the image, or leave such samples out with data.on_bad_image=skip",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """An image as tiles: the padded square of LLaVA 1.5, or where there is a tiling, LLaVA-NeXT's grid of them.

    The square: alpha dropped, centred on a square of one colour, bicubic resize. The grid: an overview resized without
    regard to its aspect, then the image scaled to fit the best grid, centred on black, and cut row by row.

    Pillow does the resizing wherever this runs: torchvision's bicubic differs from it by one or two of 255, so that a
    model would see other images in training than in evaluation on a machine with other packages.

    Attributes:
        image_size: side of the result, in pixels.
        fill_rgb: colour of the square's padding.
        tiling: grids to cut into; none where it has none.
    """

    image_size: int
    fill_rgb: tuple[int, int, int]
    tiling: Tiling = UNTILED

    @classmethod
    def for_statistics(cls, image_size: int, mean: Sequence[float], tiling: Tiling = UNTILED) -> ImageTransform:
        """Padding in the mean colour of the vision tower's training images, rounded down as published."""
        red, green, blue = (int(255 * channel) for channel in mean)
        return cls(image_size, (red, green, blue), tiling)

    def __call__(self, image: Image.Image) -> Tensor:
        """The padded square, uint8 (3, image_size, image_size); the model normalises it on its own device.

        Raises:
            UserError: the image or its square is larger than MAX_PIXELS.
        """
        _check_size(image.size, getattr(image, "filename", "") or "an image", MAX_PIXELS)
        rgb = image if image.mode == "RGB" else image.convert("RGB")  # which would copy
        width, height = rgb.size
        side = max(width, height)
        if width > height:
            # Pillow resizes along rows first and rounds to bytes between. Along rows first by itself, and only then
            # padded above and below, gives the same bytes, without resizing rows of padding.
            rgb = rgb.resize((self.image_size, height), Image.Resampling.BICUBIC)
        if width != height:
            padded = Image.new("RGB", (rgb.width if width > height else side, side), self.fill_rgb)
            padded.paste(rgb, ((padded.width - rgb.width) // 2, (side - height) // 2))
            rgb = padded
        if rgb.size != (self.image_size, self.image_size):
            rgb = rgb.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return _to_tensor(rgb).contiguous()

    def cut(self, image: Image.Image) -> Tensor:
        """The tiles of one image, uint8 (tiles, 3, image_size, image_size): the overview first, then row by row.

        Raises:
            UserError: the image or its square is larger than MAX_PIXELS.
        """
        tiling, side = self.tiling, self.image_size
        if not tiling.grids:
            return self(image)[None]
        _check_size(image.size, getattr(image, "filename", "") or "an image", MAX_PIXELS)
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        columns, rows = tiling.grid(rgb.size, side)
        left, top, right, bottom = tiling.box(rgb.size, side)
        canvas = Image.new("RGB", (columns * side, rows * side))
        canvas.paste(rgb.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
        grid = _to_tensor(canvas).unflatten(2, (columns, side)).unflatten(1, (rows, side))  # (3, rows, y, columns, x)
        tiles = grid.permute(1, 3, 0, 2, 4).flatten(0, 1)
        if not tiling.overview:
            return tiles.contiguous()
        overview = _to_tensor(rgb.resize((side, side), Image.Resampling.BICUBIC))
        return torch.cat([overview[None], tiles])

    def count(self, size: Size) -> int:
        """Tiles that `cut` makes of an image of that size."""
        return self.tiling.count(size, self.image_size)

    def tiles(self, images: Sequence[Image.Image]) -> Tensor:
        """The tiles of the images of one record, in order, as uint8 (B, 3, image_size, image_size); B may be 0."""
        if not images:
            return torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return torch.cat([self.cut(image) for image in images])


def _to_tensor(rgb: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def normalise(tiles_B3HW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turns uint8 tiles into what the vision tower was trained on, float32: (x / 255 - mean) / std per channel."""
    # Channel by channel with Python scalars: there is no constant tensor to move to the device in every step.
    channels = zip((tiles_B3HW.float() / 255).unbind(-3), mean, std, strict=True)
    return torch.stack([(channel - shift) / scale for channel, shift, scale in channels], dim=-3)
