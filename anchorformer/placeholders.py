"""Which image a placeholder stands for, and how many positions: known from its tiles, or only once it was looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from anchorformer.dialogue import PLACEHOLDER
from anchorformer.errors import UserError
from anchorformer.tiling import Tiling

TokenCounts = Sequence[Sequence[int]]
"""Of each image the embeddings of each of its views, which is mostly a tile."""


def placeholders(
    tile_counts: Sequence[int], tiling: Tiling, fixed: int | None, token_counts: TokenCounts | None, where: str
) -> list[int]:
    """Positions of each image.

    Args:
        tile_counts: tiles of each image.
        fixed: embeddings of every view; None where that depends on what it shows.
        token_counts: what the model has seen; compared with `fixed` where there is such a number.
        where: names the sample in messages.

    Raises:
        UserError: `token_counts` is needed and not there, or is not of these images.
    """
    if token_counts is None:
        if fixed is None and tile_counts:
            raise UserError(
                f"{where}: how many embeddings its images have is not known",
                found=f"{len(tile_counts)} image(s) without token_counts, and a selector that goes by what it sees",
                expected="token_counts: embeddings of each tile of each image",
                remedy="look at the images first (`anchorformer.seen.look`), or ask through Seen or Answer",
            )  # fmt: skip
        return [(fixed or 0) * tiling.views(tiles) for tiles in tile_counts]
    views = [tiling.views(tiles) for tiles in tile_counts]
    is_right = [len(own) for own in token_counts] == views
    if not is_right or any(count < 1 or fixed not in (None, count) for own in token_counts for count in own):
        raise UserError(
            f"{where}: token_counts is not of these images", found=[list(own) for own in token_counts],
            expected=f"for each image the embeddings of its views, of which they have {views}"
            + ("" if fixed is None else f", {fixed} each"),
            remedy="pass what `anchorformer.seen.look` said of the same images, in their order; where a run says so, "
            "images have changed: remove complete-* in its feature cache and start again",
        )  # fmt: skip
    return [sum(own) for own in token_counts]


def deal(images: Any, counts: list[int]) -> list[list[Image.Image]]:
    """Images per sample: as given where they are nested, otherwise in order of the placeholders.

    In a question that is asked now, a placeholder without an image is a forgotten image, never ordinary text.

    Raises:
        UserError: as many images as placeholders are expected, of each sample or over all of them.
    """
    given: list[Any] = [images] if isinstance(images, Image.Image) else list(images or ())
    if given and not isinstance(given[0], Image.Image):
        if [len(own) for own in given] != counts:
            raise _mismatch(f"{counts} {PLACEHOLDER} and {[len(own) for own in given]} image(s) per sample")
        return [list(own) for own in given]
    if len(given) != sum(counts):
        raise _mismatch(f"{sum(counts)} {PLACEHOLDER} and {len(given)} image(s)")
    remaining = iter(given)
    return [[next(remaining) for _ in range(count)] for count in counts]


def _mismatch(found: str) -> UserError:
    return UserError(
        "placeholders and images do not match", found=found, expected="one image for each placeholder, in their order",
        remedy="pass every image, and take the placeholder out of questions without one",
    )  # fmt: skip
