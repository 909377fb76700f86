"""The C-Abstractor: convolutions over the grid of patches around a pooling that sets the number of embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from anchorformer.connectors.base import Connector, ConnectorConfig
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.errors import UserError
from anchorformer.raster import side_of

_SQUEEZE = 0.25
_INIT_STD = 0.02


class Activation(str, Enum):
    """What stands between the two linears of the projector."""

    gelu = "gelu"
    silu = "silu"


@dataclass(frozen=True, kw_only=True)
class CAbstractorConfig(ConnectorConfig):
    """By default as AnchorFormer re-implements it; Honeybee's own adds positions and projects with SiLU."""

    num_queries: Annotated[int, Field(ge=1)] = 144
    """Embeddings per image, a square number not above the tower's patches."""
    depth: Annotated[int, Field(ge=1)] = 3
    """Bottlenecks before the pooling, and as many behind it; 2.64 M parameters each at width 1024."""
    positions: Annotated[int, Field(ge=0)] = 0
    """Learned position embeddings: 0 for none, or as many as the vision tower has patches."""
    activation: Activation = Activation.gelu
    """Between the two linears of the projector: gelu as AnchorFormer, silu as Honeybee."""

    def count(self, num_tokens: int, num_anchors: int, has_cls: bool) -> int:
        """
        Raises:
            UserError: patches or embeddings that fill no square, more embeddings than patches, or another number of
                positions than of patches.
        """
        patches = num_tokens - has_cls
        side_of(patches, "the vision tower's patches")
        side_of(self.num_queries, "the embeddings of c_abstractor")
        if self.num_queries > patches:
            raise UserError(
                "c_abstractor pools, it does not invent", found=f"num_queries={self.num_queries}, {patches} patches",
                expected=f"at most {patches}", remedy="set model.connector.num_queries to a smaller square number",
            )  # fmt: skip
        if self.positions not in (0, patches):
            raise UserError(
                "the positions of c_abstractor are not those of the vision tower",
                found=f"positions={self.positions}, {patches} patches", expected=f"{patches}, or 0 for none",
                remedy=f"set model.connector.positions={patches}",
            )  # fmt: skip
        return self.num_queries

    def build(self, vision_width: int, text_width: int) -> CAbstractor:
        side_of(self.num_queries, "the embeddings of c_abstractor")
        return CAbstractor(self, vision_width, text_width)


class CAbstractor(Connector):
    """Bottlenecks, average pooling to a smaller square, bottlenecks, projector; no [CLS], anchors are not read.

    Source: Honeybee, arXiv 2312.06742, whose stages are timm's `RegStage`; and AnchorFormer's released
    re-implementation. Weights start as PyTorch's layers do, as timm's stage on its own does.
    """

    def __init__(self, config: CAbstractorConfig, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.side = side_of(config.num_queries, "the embeddings of c_abstractor")
        self.positions_PV: nn.Parameter | None = None
        if config.positions:
            self.positions_PV = nn.Parameter(torch.empty(config.positions, vision_width))
            nn.init.trunc_normal_(self.positions_PV, std=_INIT_STD)
        self.before, self.behind = (
            nn.Sequential(*(Bottleneck(vision_width) for _ in range(config.depth))) for _ in range(2)
        )
        between = nn.GELU() if config.activation is Activation.gelu else nn.SiLU()
        self.projector = nn.Sequential(nn.Linear(vision_width, text_width), between, nn.Linear(text_width, text_width))

    def forward(self, anchors: Anchors, features: VisionFeatures) -> Tensor:
        patches_BPV = features.patches_BPV.to(next(self.parameters()).dtype)
        if self.positions_PV is not None:
            patches_BPV = patches_BPV + self.positions_PV
        side = side_of(patches_BPV.shape[1], "the vision tower's patches")
        grid_BhwV = pooled(self.before(patches_BPV.unflatten(1, (side, side))), self.side)
        return cast(Tensor, self.projector(self.behind(grid_BhwV).flatten(1, 2)))


class Bottleneck(nn.Module):
    """RegNet's residual block on a channels-last grid, in which convolutions of 1x1 are linears.

    1x1, depth-wise 3x3, squeeze-and-excite, 1x1; a LayerNorm over the channels behind each convolution. Source: RegNet,
    arXiv 2003.13678, in timm's defaults with group size 1; there LayerNorm with an activation has an eps of 1e-5.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = round(_SQUEEZE * width)
        self.enter, self.norm_enter = nn.Linear(width, width, bias=False), nn.LayerNorm(width)
        self.around = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm_around = nn.LayerNorm(width)
        self.squeeze, self.excite = nn.Linear(width, inner), nn.Linear(inner, width)
        self.leave, self.norm_leave = nn.Linear(width, width, bias=False), nn.LayerNorm(width)

    def forward(self, grid_BhwV: Tensor) -> Tensor:
        x = F.silu(self.norm_enter(self.enter(grid_BhwV)))
        x = F.silu(self.norm_around(self.around(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))
        x = x * self.excite(F.silu(self.squeeze(x.mean((1, 2), keepdim=True)))).sigmoid()
        return F.silu(grid_BhwV + self.norm_leave(self.leave(x)))


def pooled(grid_BhwV: Tensor, side: int) -> Tensor:
    """Adaptive average pooling to (B, side, side, V).

    As products of matrices, axis by axis: torch's own has no deterministic backward on CUDA.
    """
    return _pooled_rows(_pooled_rows(grid_BhwV, side).transpose(1, 2), side).transpose(1, 2)


def _pooled_rows(grid_BhwV: Tensor, side: int) -> Tensor:
    length, device = grid_BhwV.shape[1], grid_BhwV.device
    cell_s1, row_h = torch.arange(side, device=device)[:, None], torch.arange(length, device=device)
    start_s1, end_s1 = cell_s1 * length // side, -(-(cell_s1 + 1) * length // side)
    window_sh = ((row_h >= start_s1) & (row_h < end_s1)).to(grid_BhwV)
    return torch.einsum("sh,bhwv->bswv", window_sh, grid_BhwV) / (end_s1 - start_s1)[:, None].to(grid_BhwV)
