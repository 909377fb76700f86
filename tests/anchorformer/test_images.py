"""Images are padded as published, whatever their mode, and no file can do more harm than an error that names it."""

from __future__ import annotations

import errno
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anchorformer import images
from anchorformer.errors import UserError
from anchorformer.images import ImageTransform, normalise, open_image

FILL = (122, 116, 104)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values, mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 10_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 40), height=st.integers(1, 40))
def test_padding(width: int, height: int) -> None:
    """At the square's own size nothing is resampled, so every pixel can be said beforehand."""
    image, side = noise(width, height), max(width, height)
    tile = ImageTransform(side, FILL)(image)
    left, top = (side - width) // 2, (side - height) // 2
    expected = torch.tensor(FILL, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
    expected[:, top : top + height, left : left + width] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert tile.dtype == torch.uint8
    assert tile.is_contiguous()
    assert torch.equal(tile, expected)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), side=st.integers(1, 80))
def test_resizing_in_two_steps_gives_the_bytes_of_padding_first(width: int, height: int, side: int) -> None:
    """Wide images are shortened along their rows before they are padded; published is to pad, then to resize."""
    image, square = noise(width, height), Image.new("RGB", (max(width, height),) * 2, FILL)
    square.paste(image, ((square.width - width) // 2, (square.height - height) // 2))
    expected = np.array(square.resize((side, side), Image.Resampling.BICUBIC))
    assert torch.equal(ImageTransform(side, FILL)(image), torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode(mode: str) -> None:
    image = Image.new("L", (5, 9), 3).convert("I").convert(mode) if mode == "I;16" else noise(5, 9).convert(mode)
    tile = ImageTransform(16, FILL)(image)
    assert tile.shape == (3, 16, 16)


def test_alpha_is_dropped_not_composited() -> None:
    image = noise(6, 6)
    transparent = image.copy()
    transparent.putalpha(0)
    transform = ImageTransform(6, FILL)
    assert torch.equal(transform(image), transform(transparent))


def test_fill_is_rounded_down() -> None:
    assert ImageTransform.for_statistics(4, (0.48145466, 0.4578275, 0.40821073)).fill_rgb == FILL


def test_tiles_of_a_record() -> None:
    transform = ImageTransform(4, FILL)
    images = [noise(4, 4), noise(3, 4)]
    assert torch.equal(transform.tiles(images), torch.stack([transform(image) for image in images]))
    assert transform.tiles([]).shape == (0, 3, 4, 4)
    assert transform.tiles([]).dtype == torch.uint8


def test_normalise() -> None:
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.25, 2.0)
    tile = torch.tensor([0, 255, 51], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    expected = torch.tensor([-1.0, 3.0, 0.1])[:, None, None].expand(2, 3, 2, 2)
    torch.testing.assert_close(normalise(tile.expand(2, 3, 2, 2), mean, std), expected)


def test_open_from_file_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "named.jpg"  # a PNG under a wrong name opens; scan reports it
    path.write_bytes(encoded(noise(7, 5)))
    assert open_image(path).size == (7, 5)
    assert np.array_equal(np.array(open_image(path)), np.array(open_image(path.read_bytes())))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"not an image", "cannot be decoded"),
        (png_that_claims(60_000, 60_000), "too large"),
        (png_that_claims(13_000, 13_000), "too large"),
        (png_that_claims(200_000, 1), "too large"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
    ],
    ids=["zero_bytes", "text", "bomb", "just_too_large", "strip", "postscript"],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_image(path)
    assert "bad.png" in error.value.what


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png: cannot be read"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match="cannot be read"):
        open_image(tmp_path)


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT, errno.ENOMEM])
def test_a_fault_of_the_disk_is_no_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int) -> None:
    """It is retried, and then passed on as it is: no `UserError`, which could be skipped or halt a run."""
    path = tmp_path / "x.png"
    path.write_bytes(encoded(noise(3, 2)))
    monkeypatch.setattr(images, "WAITS", (0.0, 0.0))
    read, faults = Path.read_bytes, [OSError(fault, "?"), OSError(fault, "?")]
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) if not faults else _raise(faults.pop()))
    assert open_image(path).size == (3, 2)
    faults += [OSError(fault, "?") for _ in range(3)]
    with pytest.raises(OSError, match=r"x\.png") as caught:
        open_image(path)
    assert (caught.value.errno, faults) == (fault, [])


def test_what_a_path_is_needs_no_second_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.time, "sleep", lambda _: pytest.fail("waited"))
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    (tmp_path / "file").touch()
    for name in ("missing", ".", "one", "file/x.png", "x" * 300):
        with pytest.raises(UserError, match="cannot be read"):
            open_image(tmp_path / name)


def _raise(error: OSError) -> bytes:
    raise error


def test_limit_is_an_argument() -> None:
    content = encoded(noise(30, 2))
    assert open_image(content, max_pixels=900).size == (30, 2)
    with pytest.raises(UserError, match=r"shop/7.*too large"):
        open_image(content, name="shop/7", max_pixels=899)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_broken_files_never_raise_anything_else(kind: str) -> None:
    """Broken off anywhere, or with a byte changed: an image or an error that the user can read."""
    whole = encoded(noise(24, 17), kind)
    random = np.random.default_rng(1)
    broken = [whole[: len(whole) * share // 40] for share in range(40)]
    for place in random.integers(0, len(whole), 150):
        changed = bytearray(whole)
        changed[place] ^= int(random.integers(1, 256))
        broken.append(bytes(changed))
    refused = 0
    for content in broken:
        try:
            ImageTransform(8, FILL)(open_image(content))
        except UserError:
            refused += 1
    assert refused >= 10
