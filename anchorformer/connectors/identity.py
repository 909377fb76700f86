"""No connector: the anchors go straight to the projector."""

from __future__ import annotations

from dataclasses import dataclass

from anchorformer.connectors.mlp import MlpConfig


@dataclass(frozen=True, kw_only=True)
class IdentityConfig(MlpConfig):
    """The module of `mlp`, under the name of the ablation that leaves the cross-attention out.

    It is also what a pruned LLaVA model has: `projector.0` and `projector.2` are its `mm_projector.0` and `.2`.
    """
