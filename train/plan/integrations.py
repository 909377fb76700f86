"""What integrations cost: parameters, and the arithmetic and memory that they add to layers of the language model.

The letters of the formulas: n visual tokens of a view; v vision width, d the language model's, h the MLP's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.plan.connectors import FP32, Surroundings
from train.plan.spec import field_of, row_of

if TYPE_CHECKING:
    from train.plan.shapes import TextShape


@dataclass(frozen=True, kw_only=True)
class IntegrationShape:
    """An integration at its sizes.

    Attributes:
        layers: of the language model that look.
        tokens: visual tokens of a view that they look at.
        parameters: all of them.
        flops: of a forward of its own modules for one view.
        values: kept of one view for backward, whatever the number of layers, in the dtype it computes in.
    """

    layers: int
    tokens: int
    parameters: int
    flops: float
    values: float

    def looking(self, text: TextShape, positions: float, views: float, looks: float) -> float:
        """Operations of a forward that the layers' own matrices are used for once more.

        Args:
            looks: sum over the samples of positions times views.
        """
        projections = 4 * text.width * (text.query * positions + text.key * self.tokens * views)
        return self.layers * (projections + 4 * text.query * self.tokens * looks)

    def kept(self, text: TextShape, size: int, positions: float, views: float, *, trained: bool) -> float:
        """Bytes that one looking layer keeps for backward beside its own.

        Of each position queries, attention's output, its fp32 logsumexp and what the gate multiplies; where weights are
        trained also the output in its flat order. Of each visual token keys, values and the norm's statistic; where
        weights are trained also its normed value.
        """
        per_position = size * (2 * text.query + text.width) + FP32 * text.heads + size * text.query * trained
        per_token = size * 2 * text.key + FP32 + size * text.width * trained
        return per_position * positions + per_token * self.tokens * views


def integration_shape(spec: Mapping[str, Any], around: Surroundings) -> IntegrationShape:
    """
    Args:
        spec: plug-in mapping with all of its fields.

    Raises:
        UserError: an integration whose cost is not written down here, or a field that is left out.
    """
    return row_of(spec, "integration", _ROWS)(spec, around)


def _eram_v(spec: Mapping[str, Any], around: Surroundings) -> IntegrationShape:
    """The MLP keeps its input and its inner values before and after GELU; what it says is kept once."""
    layers, inject = len(field_of(spec, "integration", "layers")), field_of(spec, "integration", "inject")
    v, d = around.vision, around.text
    h = field_of(spec, "integration", "hidden_width") or d
    said = around.tokens + (around.anchors if inject else 0)
    return IntegrationShape(
        layers=layers, tokens=around.tokens, parameters=(v + 1) * h + (h + 1) * d + layers * (1 + inject),
        flops=2 * said * (v * h + h * d), values=said * (v + 2 * h + d),
    )  # fmt: skip


_ROWS: dict[str, Callable[[Mapping[str, Any], Surroundings], IntegrationShape]] = {
    "anchorformer.integrations.eram_v.EramVConfig": _eram_v,
}
