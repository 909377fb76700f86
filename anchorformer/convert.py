"""The published AnchorFormer and LLaVA projector state dicts, to and from the names used here."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from anchorformer.errors import UserError

logger = logging.getLogger(__name__)

_PUBLISHED_PREFIX = re.compile(r"^(model\.)?mm_projector\.")
_LATENTS = "0.latents"
_FEED_FORWARD = {"norm": "0", "up": "1", "down": "3"}
_LAYER = re.compile(
    r"layers\.(\d+)\.(?:cross\.(norm_media|norm_queries|to_q|to_kv|to_out)|ff\.(norm|up|down))\.(weight|bias)"
)


def read_published(path: Path) -> dict[str, Tensor]:
    """A published projector's tensors: a `.safetensors` file, or one of torch such as LLaVA's `mm_projector.bin`.

    Of a file that holds more than a projector only what is named `mm_projector` is taken.

    Raises:
        UserError: no such file, or one that holds anything but tensors by name; no code in it is ever run.
    """
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise _no_projector(path, " ".join(str(error).split())[:300]) from None
    if not (isinstance(found, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())):
        raise _no_projector(path, f"{type(found).__name__}, not tensors by name")
    return {key: value for key, value in found.items() if _PUBLISHED_PREFIX.match(key)} or found


def _no_projector(path: Path, found: str) -> UserError:
    return UserError(
        f"the projector {path} cannot be read", found=found, expected="mm_projector.bin or a .safetensors file",
        remedy="name the file of the projector's weights; a clone without git-lfs holds pointers instead",
    )  # fmt: skip


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
