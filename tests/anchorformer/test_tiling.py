"""Tiles: the grid shows most of an image, every pixel is on a tile, and as many are counted as are cut."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anchorformer.errors import UserError
from anchorformer.images import ImageTransform, image_size
from anchorformer.schema import parse
from anchorformer.tiling import Select, Tiling

SIDE = 8
grids = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6, unique=True)
sizes = st.tuples(st.integers(1, 70), st.integers(1, 70))


def shown(grid: tuple[int, int], size: tuple[int, int]) -> int:
    """Pixels of the image that a grid can show."""
    scale = min(grid[0] * SIDE / size[0], grid[1] * SIDE / size[1])
    return min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])


@given(grids, sizes)
def test_the_grid_shows_most_and_pads_least(choice: list[tuple[int, int]], size: tuple[int, int]) -> None:
    grid = Tiling(grids=tuple(choice)).grid(size, SIDE)
    best = max(shown(each, size) for each in choice)
    equals = [each for each in choice if shown(each, size) == best]
    assert shown(grid, size) == best
    assert grid == min(equals, key=lambda each: each[0] * each[1])  # the first one of the smallest canvas


@given(grids, sizes, st.booleans())
def test_the_tiles_are_the_canvas(choice: list[tuple[int, int]], size: tuple[int, int], overview: bool) -> None:
    tiling = Tiling(grids=tuple(choice), overview=overview)
    columns, rows = tiling.grid(size, SIDE)
    left, top, right, bottom = tiling.box(size, SIDE)
    assert 0 <= left < right <= columns * SIDE
    assert 0 <= top < bottom <= rows * SIDE
    assert right - left == columns * SIDE or bottom - top == rows * SIDE  # it fills the canvas one way
    pixels = np.random.default_rng(0).integers(1, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    tiles = ImageTransform(SIDE, (1, 2, 3), tiling).cut(image)
    assert tiles.shape == (tiling.count(size, SIDE), 3, SIDE, SIDE)
    assert tiles.shape[0] in tiling.counts
    whole = torch.cat([torch.cat(list(row), dim=2) for row in tiles[int(overview) :].unflatten(0, (rows, columns))], 1)
    scaled = np.array(image.resize((right - left, bottom - top), Image.Resampling.BICUBIC))
    assert torch.equal(whole[:, top:bottom, left:right], torch.from_numpy(scaled).permute(2, 0, 1))
    whole[:, top:bottom, left:right] = 0
    assert not whole.any()  # all else is black
    if overview:
        squashed = np.array(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        assert torch.equal(tiles[0], torch.from_numpy(squashed).permute(2, 0, 1))


def test_without_grids_nothing_changes() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8))
    plain = ImageTransform(SIDE, (1, 2, 3))
    assert torch.equal(plain.tiles([image]), plain(image)[None])
    assert plain.count(image.size) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"grids": [[2, 2], [2, 2]]}, "each named once"), ({"grids": [[7, 7]]}, "at most 36"),
        ({"grids": [[0, 1]]}, "greater than or equal"), ({"select": "image"}, "at least one grid"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(Tiling, values, "tiling")


def test_lengths_depend_on_sizes_only_where_they_must() -> None:
    several = ((1, 2), (2, 1), (2, 2))
    assert Tiling(grids=several).needs_sizes
    assert not Tiling(grids=((1, 2), (2, 1))).needs_sizes  # either has two tiles
    assert not Tiling(grids=((2, 2),)).needs_sizes
    assert not Tiling(grids=several, select=Select.image).needs_sizes


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_the_header_says_the_size(kind: str, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (31, 17)).save(file, kind)
    (tmp_path / "image").write_bytes(file.getvalue())
    assert image_size(file.getvalue()) == image_size(tmp_path / "image") == (31, 17)
    # The header is enough: what cannot be decoded still has a size, and its sample is left out when its turn comes.
    assert image_size(file.getvalue()[: len(file.getvalue()) // 2]) in ((31, 17), None)


def test_what_is_no_image_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no image")
    assert [image_size(tmp_path / name) for name in ("text", "missing", ".")] == [None] * 3
    assert image_size(b"") is None
