"""The published AnchorFormer and LLaVA projector state dicts, to and from the names used here."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from torch import Tensor

from anchorformer.errors import UserError

logger = logging.getLogger(__name__)

_PUBLISHED_PREFIX = re.compile(r"^(model\.)?mm_projector\.")
_LATENTS = "0.latents"
_FEED_FORWARD = {"norm": "0", "up": "1", "down": "3"}
_LAYER = re.compile(
    r"layers\.(\d+)\.(?:cross\.(norm_media|norm_queries|to_q|to_kv|to_out)|ff\.(norm|up|down))\.(weight|bias)"
)


def from_published(published: Mapping[str, Tensor], connector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a published projector's tensors to those of a connector.

    Understood are the resampler followed by two linears (`0.*`, `1.*`, `3.*`) and LLaVA's plain MLP (`0.*`, `2.*`),
    each with or without the checkpoint's `model.mm_projector.` in front. The learned latents of the published
    AnchorFormer belong to the resampler baseline; the anchor path never reads them, so they are dropped there, which
    is logged.

    Args:
        published: the published state dict.
        connector: state dict of the connector to fill (`connector.state_dict()`; may be on the meta device).

    Raises:
        UserError: tensors left over, missing, or of another shape.
    """
    theirs = {_PUBLISHED_PREFIX.sub("", key): value for key, value in published.items()}
    stack = _has_stack(connector)
    wanted = {_published_name(key, stack): key for key in connector}
    if stack and _LATENTS not in wanted and _LATENTS in theirs:
        latents = theirs.pop(_LATENTS)
        logger.info("dropped `latents` %s: anchors are the queries, so nothing reads them", tuple(latents.shape))
    unexpected, missing = sorted(theirs.keys() - wanted.keys()), sorted(wanted.keys() - theirs.keys())
    reshaped = [key for key in theirs if key in wanted and theirs[key].shape != connector[wanted[key]].shape]
    if unexpected or missing or reshaped:
        raise UserError(
            "the published projector does not fit this connector",
            found=f"unexpected {unexpected[:4]}, missing {missing[:4]}, "
            f"other shape {[f'{key} {tuple(theirs[key].shape)}' for key in reshaped[:4]]}",
            expected=f"{len(wanted)} tensors "
            f"{[f'{key} {tuple(connector[wanted[key]].shape)}' for key in reshaped[:4] or sorted(wanted)[:4]]}",
            remedy="build the connector with the depth, heads and widths of the published checkpoint",
        )
    return {ours: theirs[name] for name, ours in wanted.items()}


def to_published(connector: Mapping[str, Tensor], num_latents: int = 144) -> dict[str, Tensor]:
    """Renames a connector's tensors to the published layout, without the `mm_projector.` prefix.

    Args:
        connector: state dict of an AnchorFormer, resampler or MLP connector.
        num_latents: how many latents the published AnchorFormer module holds; it loads strictly and so needs them,
            though its anchor path does not read them. They are written as zeros.
    """
    stack = _has_stack(connector)
    published = {_published_name(key, stack): value for key, value in connector.items()}
    if stack and _LATENTS not in published:
        published[_LATENTS] = connector["norm.weight"].new_zeros(num_latents, connector["norm.weight"].numel())
    return published


def _has_stack(connector: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("layers.") for key in connector)


def _published_name(ours: str, stack: bool) -> str:
    """A tensor's published name; the two linears are modules 1 and 3 behind a stack (module 0), alone 0 and 2."""
    if ours == "queries_TV":
        return _LATENTS
    part, _, rest = ours.partition(".")
    if part == "projector":
        linear, _, kind = rest.partition(".")
        return f"{int(linear) + stack}.{kind}"
    if part == "norm":
        return f"0.norm.{rest}"
    layer = _LAYER.fullmatch(ours)
    if layer is None:
        raise UserError(
            "the published code has no counterpart of this connector", found=ours,
            expected="a connector of AnchorFormer's, Flamingo's or LLaVA's design", remedy="convert one of these",
        )  # fmt: skip
    index, cross, ff, kind = layer.groups()
    if cross:
        return f"0.layers.{index}.0.{cross.replace('norm_queries', 'norm_latents')}.{kind}"
    return f"0.layers.{index}.1.{_FEED_FORWARD[ff]}.{kind}"
