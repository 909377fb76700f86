"""How many positions stand for each image: known from its tiles, or only once the model has looked at it."""

from __future__ import annotations

from collections.abc import Sequence

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
