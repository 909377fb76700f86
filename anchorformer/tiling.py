"""How an image of high resolution becomes tiles of the vision tower's side: grids, best fit, and what is a view."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from pydantic import Field

from anchorformer.errors import UserError
from anchorformer.schema import Schema

Size = tuple[int, int]
"""(width, height) in pixels."""

MOST_TILES = 36
"""Tiles of one grid; each one costs a pass through the tower, and an embedding per anchor."""

Cells = Annotated[int, Field(ge=1, le=MOST_TILES, strict=True)]


class Select(str, Enum):
    """What the selector chooses from."""

    tile = "tile"
    """Every tile is a view of its own: as many anchors from each, tile after tile."""
    image = "image"
    """All tiles of an image are one view: as many anchors from the whole image."""


@dataclass(frozen=True, kw_only=True)
class Tiling(Schema):
    """Which grids of tiles an image may be cut into; without any it is one tile, the padded square of LLaVA-1.5.

    Grids count tiles, not pixels, so that one config serves towers of any side: [2, 2] is 672 x 672 pixels for a tower
    of 336. Source of the best fit: LLaVA-NeXT's `anyres` with its list of grid pinpoints.
    """

    grids: tuple[tuple[Cells, Cells], ...] = ()
    """(columns, rows) of the grids to choose from; with a single one every image has the same number of tiles."""
    overview: bool = True
    """Whether a tile that shows the whole image comes before those of the grid."""
    select: Select = Select.tile
    """Whether anchors are chosen, and the connector looks, tile by tile or over all tiles of an image."""

    def __post_init__(self) -> None:
        largest = max((columns * rows for columns, rows in self.grids), default=0)
        if largest > MOST_TILES or len(set(self.grids)) < len(self.grids):
            raise UserError(
                "tiling.grids cannot be used", found=self.grids,
                expected=f"grids of at most {MOST_TILES} tiles, each named once", remedy="correct model.tiling.grids",
            )  # fmt: skip
        if not self.grids and self.select is Select.image:
            raise UserError(
                "tiling.select=image without tiles", found="no grids", expected="at least one grid",
                remedy="choose one, e.g. tiling=grid_2x2_global, or leave select at tile",
            )  # fmt: skip

    @property
    def counts(self) -> tuple[int, ...]:
        """Every number of tiles that an image may have, ascending."""
        return tuple(sorted({columns * rows + self.overview for columns, rows in self.grids})) or (1,)

    @property
    def needs_sizes(self) -> bool:
        """Whether the number of placeholders of an image depends on its width and height."""
        return self.select is Select.tile and len(self.counts) > 1

    @property
    def spans_tiles(self) -> bool:
        """Whether all tiles of an image are one view."""
        return self.select is Select.image

    def grid(self, size: Size, side: int) -> tuple[int, int]:
        """The grid (columns, rows) that shows most of an image: `anyres`' choice for tiles of `side` pixels.

        Most pixels of the image after scaling to fit, none counted that scaling up invents; then least padding; then
        the first in the list.

        Raises:
            ValueError: there are no grids.
        """

        def fit(grid: tuple[int, int]) -> tuple[int, int]:
            canvas = _canvas(grid, side)
            scale = min(canvas[0] / size[0], canvas[1] / size[1])
            shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
            return shown, shown - canvas[0] * canvas[1]

        return max(self.grids, key=fit)

    def box(self, size: Size, side: int) -> tuple[int, int, int, int]:
        """Where the scaled image lies on the canvas of its grid: left, top, right, bottom; centred, rounded down."""
        width, height = _canvas(self.grid(size, side), side)
        across, down = width / size[0], height / size[1]
        new_width = width if across < down else min(math.ceil(size[0] * down), width)
        new_height = min(math.ceil(size[1] * across), height) if across < down else height
        left, top = (width - new_width) // 2, (height - new_height) // 2
        return left, top, left + new_width, top + new_height

    def count(self, size: Size, side: int) -> int:
        """Tiles of an image of `size`."""
        if len(self.counts) == 1:
            return self.counts[0]
        columns, rows = self.grid(size, side)
        return columns * rows + self.overview

    def views(self, tiles: int) -> int:
        """Views that an image of so many tiles is read in; each has the model's `num_image_tokens` embeddings."""
        return 1 if self.spans_tiles else tiles


UNTILED = Tiling()
"""An image is one tile."""


def _canvas(grid: tuple[int, int], side: int) -> Size:
    return grid[0] * side, grid[1] * side
