"""Which layers of a vision tower a selector's needs name, and how many blocks have to run for them."""

from __future__ import annotations

from dataclasses import replace

from anchorformer.contracts import VisionNeeds
from anchorformer.errors import UserError


def resolved(needs: VisionNeeds, num_layers: int) -> VisionNeeds:
    """The same needs with layers counted from the front (0 = embeddings, `num_layers` = the last block).

    Raises:
        UserError: a layer that the tower does not have, a sum that begins behind its end, keys of one layer twice.
    """
    first = needs.cls_attention_from
    layer = counted("layer", needs.layer, num_layers)
    if first is not None:
        first = counted("start_layer", first, num_layers)
        if first > layer:
            raise UserError(
                "the selector's layers are in the wrong order",
                found=f"start_layer={needs.cls_attention_from} behind layer={needs.layer} of {num_layers} blocks",
                expected=f"a start_layer from 1 to {layer}",
                remedy="correct `start_layer` or `layer` of the selector",
            )
    qk = tuple(counted("layer of keys", each, num_layers) for each in needs.qk)
    if len(set(qk)) < len(qk):
        raise UserError(
            "the selector reads keys of one layer twice",
            found=f"layers {needs.qk} of a tower with {num_layers} blocks", expected="different layers",
            remedy="correct the layers of the selector",
        )  # fmt: skip
    return replace(needs, layer=layer, cls_attention_from=first, qk=qk)


def counted(name: str, layer: int, num_layers: int) -> int:
    """A layer counted from the front.

    Args:
        name: of the field that says it.

    Raises:
        UserError: the tower does not have it.
    """
    found = layer if layer >= 0 else num_layers + 1 + layer
    if not 1 <= found <= num_layers:
        raise UserError(
            "the vision tower has no such layer",
            found=f"{name}={layer} of a tower with {num_layers} blocks",
            expected=f"1 to {num_layers}, or -{num_layers} to -1",
            remedy=f"correct `{name}` of the selector",
        )
    return found


def num_layers_needed(tapped: VisionNeeds, num_layers: int) -> int:
    """How many blocks have to run.

    Args:
        tapped: needs whose layers are counted from the front.
    """
    return num_layers if tapped.final else max((tapped.layer, *tapped.qk))
