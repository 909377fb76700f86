"""The square that an image's patches, or what a connector makes of them, form row by row."""

from __future__ import annotations

import math

from anchorformer.errors import UserError


def side_of(count: int, what: str) -> int:
    """The side of a square of `count` cells.

    Args:
        what: what there are `count` of, for the message.

    Raises:
        UserError: the count is no square; names the next ones.
    """
    side = math.isqrt(count)
    if side**2 != count:
        raise UserError(
            f"{what} have to fill a square", found=count,
            expected=f"a square number, such as {max(side, 1) ** 2} or {(side + 1) ** 2}",
            remedy="choose one of these, or a part that needs no raster",
        )  # fmt: skip
    return side
