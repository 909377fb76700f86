"""Draws anchors and attention onto an image as the vision tower saw it."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from anchorformer.demo.seeing import NO_ANCHOR, Sight

Rgb = tuple[int, int, int]

SIDE = 480
"""Pixels per side of a tile where it is the only one, about; several share them."""
SMALLEST = 240
"""Pixels per side that a tile has at least."""
COLUMNS = 3
"""Tiles beside each other."""
GAP = 6
"""Pixels between tiles, and around the colours of heads."""
SHADE, TINT = 0.3, 0.25
"""Brightness of what is no anchor, and how much of an anchor is its head's colour."""
TEXT = 14
"""Height of the legend's letters, in pixels."""
LOOKED_AT: Rgb = (255, 140, 0)


def draw_anchors(sight: Sight) -> Image.Image:
    """What is no anchor darkened, each anchor framed in its head's colour, the colours of heads below."""
    colours = colours_of(sight.num_heads)
    pictures = []
    for index, tile in enumerate(_tiles(sight)):
        if sight.heads_BP is not None:
            heads_GG = _grid(sight.heads_BP[index])
            light = _spread(np.where(heads_GG == NO_ANCHOR, SHADE, 1 - TINT), tile.size)
            tint = _spread(np.array([*colours, (0, 0, 0)])[heads_GG] * TINT, tile.size)  # NO_ANCHOR is the last one
            tile = Image.fromarray((np.asarray(tile) * light[..., None] + tint).clip(0, 255).astype(np.uint8))
            _frame(tile, heads_GG, colours)
        pictures.append(tile)
    picture = _side_by_side(pictures)
    return _with_legend(picture, colours) if sight.heads_BP is not None and sight.num_heads > 1 else picture


def draw_attention(sight: Sight) -> Image.Image:
    """Each anchor as bright as the answer looked at it: the brightest is the one that it looked at most."""
    pictures = []
    for index, tile in enumerate(_tiles(sight)):
        if sight.attention_BP is not None:
            strength_GG = _grid(sight.attention_BP[index] / sight.attention_BP.max().clamp(min=1e-9))
            strength = _spread(strength_GG, tile.size)[..., None]
            grey = np.asarray(tile.convert("L"), dtype=np.float32)[..., None].repeat(3, 2)
            warm = 0.5 * grey + 0.5 * np.array(LOOKED_AT)
            mixed = grey * SHADE * (1 - strength) + warm * strength
            tile = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
        pictures.append(tile)
    return _side_by_side(pictures)


def colours_of(num_heads: int) -> list[Rgb]:
    """One colour per head, as far apart as they can be; neighbours differ in brightness too."""
    colours = []
    for head in range(num_heads):
        red, green, blue = colorsys.hsv_to_rgb(head / num_heads, 0.85, 1.0 if head % 2 == 0 else 0.75)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours


def _tiles(sight: Sight) -> list[Image.Image]:
    """Enlarged by whole numbers, so that borders of patches stay borders of pixels."""
    count, side = sight.tiles_B3HW.shape[0], sight.tiles_B3HW.shape[-1]
    wanted = max(SIDE // min(count, COLUMNS), SMALLEST)
    scale = max(1, round(wanted / side))
    return [
        Image.fromarray(tile.permute(1, 2, 0).numpy()).resize((side * scale, side * scale), Image.Resampling.BICUBIC)
        for tile in sight.tiles_B3HW
    ]


def _grid(values_P: Tensor) -> np.ndarray:
    side = math.isqrt(values_P.numel())
    return values_P.view(side, side).to(torch.float32 if values_P.is_floating_point() else torch.int64).numpy()


def _cells(length: int, side: int) -> np.ndarray:
    """First pixel of each of the patches along one side, and the end."""
    return np.arange(side + 1) * length // side


def _spread(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values of a grid of patches (G, G, ...) for each pixel of an image of `size`."""
    across, down = (np.arange(length) * values.shape[0] // length for length in size)
    spread: np.ndarray = values[down][:, across]
    return spread


def _frame(tile: Image.Image, heads_GG: np.ndarray, colours: Sequence[Rgb]) -> None:
    pen, side = ImageDraw.Draw(tile), heads_GG.shape[0]
    edges = _cells(tile.width, side).tolist()
    thickness = max(1, tile.width // side // 12)
    for row, column in np.argwhere(heads_GG != NO_ANCHOR).tolist():
        box = edges[column], edges[row], edges[column + 1] - 1, edges[row + 1] - 1
        pen.rectangle(box, outline=colours[heads_GG[row, column]], width=thickness)


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    columns = min(len(pictures), COLUMNS)
    rows = -(-len(pictures) // columns)
    side = pictures[0].width
    sheet = Image.new("RGB", (columns * (side + GAP) - GAP, rows * (side + GAP) - GAP), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * (side + GAP), index // columns * (side + GAP)))
    return sheet


def _with_legend(picture: Image.Image, colours: Sequence[Rgb]) -> Image.Image:
    font = ImageFont.load_default(TEXT)
    room = 2 * GAP + TEXT + round(max(font.getlength(f"head {head}") for head in range(1, len(colours) + 1)))
    columns = max(1, picture.width // room)
    rows = -(-len(colours) // columns)
    sheet = Image.new("RGB", (picture.width, picture.height + GAP + rows * (TEXT + GAP)), "white")
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    for head, colour in enumerate(colours):
        left, top = head % columns * room, picture.height + GAP + head // columns * (TEXT + GAP)
        pen.rectangle((left, top, left + TEXT - 1, top + TEXT - 1), fill=colour)
        pen.text((left + TEXT + GAP, top - 1), f"head {head + 1}", fill="black", font=font)
    return sheet
