"""The published AnchorFormer and LLaVA projector state dicts, to and from the names used here."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from anchorformer.errors import UserError

logger = logging.getLogger(__name__)

_PUBLISHED_PREFIX = re.compile(r"^(model\.)?mm_projector\.")
_CROSS = {
    "norm_media": "norm_media",
    "norm_latents": "norm_queries",
    "to_q": "to_q",
    "to_kv": "to_kv",
    "to_out": "to_out",
}
_FEED_FORWARD = {"0": "norm", "1": "up", "3": "down"}
_RENAMES = (
    (re.compile(r"^0\.layers\.(\d+)\.0\.(\w+)\.(\w+)$"), lambda m: f"layers.{m[1]}.cross.{_CROSS[m[2]]}.{m[3]}"),
    (re.compile(r"^0\.layers\.(\d+)\.1\.([013])\.(\w+)$"), lambda m: f"layers.{m[1]}.ff.{_FEED_FORWARD[m[2]]}.{m[3]}"),
    (re.compile(r"^0\.norm\.(\w+)$"), lambda m: f"norm.{m[1]}"),
    (re.compile(r"^0\.latents$"), lambda m: "queries_TV"),
)


def from_published(published: Mapping[str, Tensor], connector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a published projector's tensors to those of a connector.

    Understood are the resampler followed by two linears (`0.*`, `1.*`, `3.*`) and LLaVA's plain MLP (`0.*`, `2.*`),
    each with or without the checkpoint's `model.mm_projector.` in front. The learned latents of the published AnchorFormer
    belong to the resampler baseline; the anchor path never reads them, so they are dropped there, which is logged.

    Args:
        published: the published state dict.
        connector: state dict of the connector to fill (`connector.state_dict()`; may be on the meta device).

    Raises:
        UserError: tensors left over, missing, or of another shape.
    """
    named = {_rename(_PUBLISHED_PREFIX.sub("", key), _is_mlp(published)): value for key, value in published.items()}
    if "queries_TV" not in connector and "queries_TV" in named:
        latents = named.pop("queries_TV")
        logger.info("dropped `latents` %s: anchors are the queries, so nothing reads them", tuple(latents.shape))
    unexpected, missing = sorted(named.keys() - connector.keys()), sorted(connector.keys() - named.keys())
    reshaped = [key for key in named.keys() & connector.keys() if named[key].shape != connector[key].shape]
    if unexpected or missing or reshaped:
        raise UserError(
            "the published projector does not fit this connector",
            found=f"unexpected {unexpected[:4]}, missing {missing[:4]}, other shape "
            f"{[f'{key} {tuple(named[key].shape)}' for key in sorted(reshaped)[:4]]}",
            expected=f"{len(connector)} tensors, "
            f"{[f'{key} {tuple(connector[key].shape)}' for key in sorted(reshaped)[:4]]}",
            remedy="build the connector with the depth, heads and widths of the published checkpoint",
        )
    return named


def to_published(connector: Mapping[str, Tensor], num_latents: int = 144) -> dict[str, Tensor]:
    """Renames a connector's tensors to the published layout, without the `mm_projector.` prefix.

    Args:
        connector: state dict of an AnchorFormer, resampler or MLP connector.
        num_latents: how many latents the published AnchorFormer module holds; it loads strictly and so needs them,
            though its anchor path does not read them. They are written as zeros.
    """
    if not any(key.startswith("layers.") for key in connector):
        return {key.removeprefix("projector."): value for key, value in connector.items()}
    published = {_unrename(key): value for key, value in connector.items()}
    if "0.latents" not in published:
        norm = connector["norm.weight"]
        published["0.latents"] = torch.zeros(num_latents, norm.shape[0], dtype=norm.dtype)
    return published


def _is_mlp(published: Mapping[str, Tensor]) -> bool:
    return not any(".layers." in key or key.endswith("latents") for key in published)


def _rename(key: str, mlp: bool) -> str:
    if mlp:
        return f"projector.{key}"
    for pattern, name in _RENAMES:
        match = pattern.match(key)
        if match:
            return name(match)
    linear, _, rest = key.partition(".")
    return f"projector.{int(linear) - 1}.{rest}" if linear in ("1", "3") else key


def _unrename(key: str) -> str:
    if key == "queries_TV":
        return "0.latents"
    head, *rest = key.split(".")
    if head == "projector":
        return f"{int(rest[0]) + 1}.{rest[1]}"
    if head == "norm":
        return f"0.{key}"
    index, block, name, kind = rest
    if block == "cross":
        return f"0.layers.{index}.0.{ {ours: theirs for theirs, ours in _CROSS.items()}[name] }.{kind}"
    return f"0.layers.{index}.1.{ {ours: theirs for theirs, ours in _FEED_FORWARD.items()}[name] }.{kind}"
