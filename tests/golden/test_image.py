"""Pixels against the published preprocessing: integers exact, normalised values within float16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
from safetensors.torch import load_file

from anchorformer.images import ImageTransform, normalise, open_image
from anchorformer.tiling import Tiling


def test_pixels(golden_root: Path, subtests: pytest.Subtests) -> None:
    folder = golden_root / "image"
    info = json.loads((folder / "pixels.json").read_text("utf-8"))
    tensors = load_file(folder / "pixels.safetensors")
    settings = info["processor"]
    transform = ImageTransform.for_statistics(settings["crop_size"]["height"], settings["image_mean"])
    assert list(transform.fill_rgb) == info["pad_fill_rgb"]
    for facts in info["images"]:
        name = facts["name"]
        with subtests.test(name):
            tile = transform(open_image(folder / f"{name}.png"))
            if facts["pad_misread_as_channels_first"]:
                pytest.skip("the published code takes an image this small for one with its channels first")
            assert torch.equal(tile, tensors[f"{name}.pixel_u8"])
            pixels = normalise(tile, settings["image_mean"], settings["image_std"])
            assert (pixels.half().float() - tensors[f"{name}.pixel_values"].float()).abs().max() <= 2e-3
            if facts["size"][0] == facts["size"][1]:
                # Without padding the two published paths are one; the stored one holds every third pixel.
                assert torch.equal(tile[:, ::3, ::3], tensors[f"{name}.square_u8"])


def test_crop_path(golden_root: Path) -> None:
    """The published path without padding cuts the longer side off; this project only pads."""
    facts = json.loads((golden_root / "image" / "pixels.json").read_text("utf-8"))["images"]
    pytest.skip(
        f"not offered: centre crop instead of padding ({sum(f['size'][0] != f['size'][1] for f in facts)} cases)"
    )


def _tiling(info: dict[str, Any], grid: str) -> Tiling:
    """A published list of canvases in pixels as grids of tiles."""
    side = info["tile"]
    return Tiling(grids=tuple((width // side, height // side) for width, height in info["grids"][grid]))


def test_best_grid(golden_root: Path) -> None:
    info = json.loads((golden_root / "image" / "anyres.json").read_text("utf-8"))
    side = info["tile"]
    for row in info["rows"]:
        tiling, size = _tiling(info, row["grid"]), tuple(row["size_wh"])
        assert tiling.grid(size, side) == tuple(row["grid_cols_rows"]), row
        assert tiling.count(size, side) == row["tiles_with_base"], row
        if "content_box_ltrb" in row:
            assert tiling.box(size, side) == tuple(row["content_box_ltrb"]), row


def test_tiles(golden_root: Path, subtests: pytest.Subtests) -> None:
    folder = golden_root / "image"
    info = json.loads((folder / "anyres.json").read_text("utf-8"))
    settings = json.loads((folder / "pixels.json").read_text("utf-8"))["processor"]
    mean, std = settings["image_mean"], settings["image_std"]
    tensors = load_file(folder / "anyres_tiles.safetensors")
    for facts in json.loads((folder / "anyres_tiles.json").read_text("utf-8")):
        name, grid = facts["image"], facts["grid"]
        with subtests.test(f"{name} {grid}"):
            transform = ImageTransform.for_statistics(info["tile"], mean, _tiling(info, grid))
            image = open_image(folder / f"{name}.png")
            tiles = transform.cut(image)
            assert tiles.shape[0] == facts["tiles"]
            expected = tensors[f"{name}.{grid}.tiles_u8"]
            assert torch.equal(tiles[1:, :, ::8, ::8], expected[1:])
            # The vectors are of Pillow 13; earlier ones squash a strip along its other axis first, and round there.
            width, height = image.size
            most = 1 if int(PIL.__version__.split(".")[0]) < 13 and height > 16 * width else 0
            assert (tiles[0, :, ::8, ::8].int() - expected[0].int()).abs().max() <= most
            means = normalise(tiles, mean, std).mean((1, 2, 3))
            assert (means - torch.tensor(facts["tile_means"])).abs().max() <= 1e-3
