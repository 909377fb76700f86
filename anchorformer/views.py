"""What selector and connector look at where an image has tiles: each of them, or all tiles of an image as one view.

A joint view has the shape of one large image, so that selectors need not know of tiles: one [CLS], which is the mean of
the tiles' own, then the patches of tile after tile. Its attention is the mean of the tiles' attentions, each of which
sums to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from anchorformer.connectors.base import ConnectorConfig
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.errors import UserError
from anchorformer.integrations.base import Integration, IntegrationConfig
from anchorformer.selectors.base import Selector, SelectorConfig
from anchorformer.tiling import Tiling
from anchorformer.vision import VisionTower


def embeddings_per_view(
    tiling: Tiling, selector: SelectorConfig, connector: ConnectorConfig, num_tokens: int, num_heads: int, has_cls: bool
) -> int | None:  # fmt: skip
    """Embeddings of a tile, or where all tiles of an image are one view, of an image; None where it depends on what the
    tile shows.

    Args:
        num_tokens, num_heads, has_cls: of the tower, for one tile.

    Raises:
        UserError: a selector or connector that needs the raster of a single tile, one whose number of embeddings
            depends on the number of tiles, a connector that cannot serve a ragged selector; and what their `count`
            raises.
    """
    for kind, part in (("selector", selector), ("connector", connector)):
        if tiling.spans_tiles and not part.spans_tiles:
            name = type(part).__module__.rpartition(".")[2]
            raise UserError(
                f"{kind} '{name}' cannot look at all tiles of an image at once", found="tiling.select=image",
                expected=f"tiling.select=tile, or a {kind} that needs no raster of patches and no learned places",
                remedy="set model.tiling.select=tile",
            )  # fmt: skip
    if selector.ragged:
        selector.count(num_tokens, num_heads, has_cls)
        _check_ragged(selector, connector)
        return None
    counts = {
        tokens: connector.count(tokens, selector.count(tokens, num_heads, has_cls), has_cls)
        for tokens in view_sizes(tiling, num_tokens, has_cls)
    }
    if len(set(counts.values())) > 1:
        raise UserError(
            "the number of embeddings of an image depends on its tiles", found=f"{counts} (tokens: embeddings)",
            expected="as many for every image where tiling.select=image",
            remedy="set model.tiling.select=tile, choose a selector with num_anchors, or a tiling of one grid",
        )  # fmt: skip
    return next(iter(counts.values()))


def _check_ragged(selector: SelectorConfig, connector: ConnectorConfig) -> None:
    if not connector.maps_each:
        names = [type(part).__module__.rpartition(".")[2] for part in (selector, connector)]
        raise UserError(
            f"connector '{names[1]}' does not map each anchor by itself",
            found=f"selector '{names[0]}', whose images have different numbers of anchors",
            expected="a connector that makes one embedding of each: anchor_former, identity or mlp",
            remedy="choose one of these, or a selector with num_anchors",
        )  # fmt: skip


def view_sizes(tiling: Tiling, num_tokens: int, has_cls: bool) -> tuple[int, ...]:
    """Visual tokens that a view may have, ascending."""
    if not tiling.spans_tiles:
        return (num_tokens,)
    return tuple(has_cls + tiles * (num_tokens - has_cls) for tiles in tiling.counts)


def build_selector(
    tiling: Tiling, selector: SelectorConfig, num_tokens: int, num_heads: int, has_cls: bool
) -> Selector:
    """The selector of the views."""
    sizes = view_sizes(tiling, num_tokens, has_cls)
    if len(sizes) == 1:
        return selector.build(sizes[0], num_heads, has_cls)
    return SelectorBySize({size: selector.build(size, num_heads, has_cls) for size in sizes})


def build_integration(
    config: IntegrationConfig | None, tiling: Tiling, selector: SelectorConfig, tower: VisionTower,
    text_config: PreTrainedConfig, num_embeddings: int | None,
) -> Integration | None:  # fmt: skip
    """The integration between these parts, with fresh weights; None where there is none.

    Args:
        num_embeddings: of a view; None where that depends on what it shows.

    Raises:
        UserError: parts that it does not go with.
    """
    if config is None:
        return None
    if num_embeddings is None:
        raise UserError(
            "an integration takes as many embeddings of every view, and this selector's views have different numbers",
            found=type(selector).__name__, expected="a selector with num_anchors",
            remedy="choose such a selector, or integration=none",
        )  # fmt: skip
    tokens = view_sizes(tiling, tower.num_tokens, tower.has_cls)
    if len(tokens) > 1:
        raise UserError(
            "an integration reads all visual tokens, and views of this tiling have different numbers of them",
            found=f"tiling.select=image with {', '.join(map(str, tokens))} tokens", expected="views of one size",
            remedy="set model.tiling.select=tile, a tiling of one grid, or integration=none",
        )  # fmt: skip
    anchors = selector.count(tokens[0], tower.num_heads, tower.has_cls)
    return config.build(tower.width, text_config, anchors, num_embeddings)


class SelectorBySize(Selector):
    """One selector for each size that a joint view may have.

    Ranks may call different ones, which ZeRO-3 must not see: it compares the submodules that ranks walk through. So
    they are kept in a plain dict, which is enough for modules without parameters.
    """

    def __init__(self, selectors: dict[int, Selector]) -> None:
        super().__init__()
        self.by_size = selectors

    def forward(self, features: VisionFeatures) -> Anchors:
        batch, longest = features.tokens_BNV.shape[:2]
        sizes = features.sizes or (longest,) * batch
        chosen: dict[int, Anchors] = {}
        for size in set(sizes):
            rows = [row for row, own in enumerate(sizes) if own == size]
            anchors = self.by_size[size](_part(features, rows, size))
            chosen |= {row: _row(anchors, place) for place, row in enumerate(rows)}
        indices = [chosen[row].indices_BT for row in range(batch)]
        return Anchors(
            tokens_BTV=torch.stack([chosen[row].tokens_BTV for row in range(batch)]),
            indices_BT=torch.stack([index for index in indices if index is not None]) if None not in indices else None,
        )


def join_tiles(features: VisionFeatures, tile_counts: Sequence[int]) -> VisionFeatures:
    """Features of tiles as those of images; shorter views are padded at their end, which `mask_BN` tells apart.

    Args:
        features: of all tiles, image after image.
        tile_counts: tiles of each image, on the host; they add up to all.
    """
    counts, cls = list(tile_counts), int(features.has_cls)

    def joined(x: Tensor | None, join: Callable[[Tensor, int], Tensor]) -> Tensor | None:
        """Of (tiles, ..., N) or, where tokens are vectors, (tiles, N, V)."""
        return None if x is None else _stacked([join(part, cls) for part in x.split(counts)], join is not _tokens)

    tokens = joined(features.tokens_BNV, _tokens)
    assert tokens is not None
    patches = features.tokens_BNV.shape[1] - cls
    sizes = tuple(cls + count * patches for count in counts)
    if len(set(sizes)) == 1:
        mask = None
    else:
        places = torch.arange(max(sizes), device=tokens.device)
        mask = torch.stack([places < size for size in sizes])
    key, query, keys = features.image_key_B, features.query_BLV, features.keys_BLNV
    if keys is not None:
        layers = keys.shape[1]
        keys = joined(keys.transpose(1, 2).flatten(2), _tokens)
        keys = None if keys is None else keys.unflatten(2, (layers, -1)).transpose(1, 2)
    return VisionFeatures(
        tokens_BNV=tokens, has_cls=features.has_cls,
        cls_scores_BHN=joined(features.cls_scores_BHN, _logits),
        cls_attention_BLN=joined(features.cls_attention_BLN, _attention),
        received_BN=joined(features.received_BN, _attention),
        query_BLV=None if query is None else torch.stack([part.mean(0) for part in query.split(counts)]),
        keys_BLNV=keys, final_BNV=joined(features.final_BNV, _tokens),
        image_key_B=None if key is None else torch.stack([part.sum() % 2**32 for part in key.split(counts)]),
        sizes=None if mask is None else sizes, mask_BN=mask,
    )  # fmt: skip


def _tokens(part_tNV: Tensor, cls: int) -> Tensor:
    return torch.cat([part_tNV[:, :cls].mean(0), part_tNV[:, cls:].flatten(0, 1)])


def _attention(part: Tensor, cls: int) -> Tensor:
    return torch.cat([part[..., :cls].mean(0), _side_by_side(part[..., cls:]) / part.shape[0]], dim=-1)


def _logits(part_tHN: Tensor, cls: int) -> Tensor:
    """`_attention` of the softmax, in logarithms."""
    log_tHN = part_tHN.log_softmax(-1) - math.log(part_tHN.shape[0])
    return torch.cat([log_tHN[..., :cls].logsumexp(0), _side_by_side(log_tHN[..., cls:])], dim=-1)


def _side_by_side(part: Tensor) -> Tensor:
    """(tiles, ..., P) as (..., tiles * P)."""
    return part.movedim(0, -2).flatten(-2)


def _stacked(rows: list[Tensor], tokens_last: bool) -> Tensor:
    """Rows of different numbers of tokens, padded with zeros."""
    if not tokens_last:
        return pad_sequence(rows, batch_first=True)
    return pad_sequence([row.movedim(-1, 0) for row in rows], batch_first=True).movedim(1, -1)


def _part(features: VisionFeatures, rows: Sequence[int], size: int) -> VisionFeatures:
    """Some of the images, all of the same number of tokens."""

    def pick(x: Tensor | None, dim: int) -> Tensor | None:
        return None if x is None else torch.stack([x[row] for row in rows]).narrow(dim, 0, size)

    last, first = partial(pick, dim=-1), partial(pick, dim=1)
    tokens, key, query = first(features.tokens_BNV), features.image_key_B, features.query_BLV
    assert tokens is not None
    return VisionFeatures(
        tokens_BNV=tokens, has_cls=features.has_cls, cls_scores_BHN=last(features.cls_scores_BHN),
        cls_attention_BLN=last(features.cls_attention_BLN), received_BN=last(features.received_BN),
        query_BLV=None if query is None else torch.stack([query[row] for row in rows]),
        keys_BLNV=pick(features.keys_BLNV, dim=2), final_BNV=first(features.final_BNV),
        image_key_B=None if key is None else torch.stack([key[row] for row in rows]),
    )  # fmt: skip


def _row(anchors: Anchors, row: int) -> Anchors:
    return Anchors(anchors.tokens_BTV[row], None if anchors.indices_BT is None else anchors.indices_BT[row])
