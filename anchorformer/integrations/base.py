"""What every integration is: a config, a module that reads views, and layers of a language model that hear of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.schema import Schema

PACKAGE = "anchorformer.integrations"

ARGUMENT = "integrated"
"""What a language model's layers are handed it as: an argument of each forward, never module state."""


@dataclass(frozen=True)
class Placed:
    """Where the views of a batch stand, in rows of text: in the flat form its samples, else those of `input_ids`.

    Shapes: X views, E embeddings of each, R rows, W views of a row at most.

    Attributes:
        said_XED: what layers read of each view.
        view_RW: int64, the views of each row in order, -1 behind the last.
        start_RW: int64, the position in its row that each of them begins at; 0 behind the last.
        kept: keys and values that layers keep of the views from one step of a generation to the next, by the place of
            the layer among those that read; None keeps nothing.
    """

    said_XED: Tensor
    view_RW: Tensor
    start_RW: Tensor
    kept: dict[int, tuple[Tensor, Tensor]] | None = field(default=None, repr=False)

    def repeated(self, times: int) -> Placed:
        """Each row so many times, for beams; the views are not copied."""
        view_RW, start_RW = (x.repeat_interleave(times, 0) for x in (self.view_RW, self.start_RW))
        return replace(self, view_RW=view_RW, start_RW=start_RW)


@dataclass(frozen=True)
class Rows:
    """Which position of which row each query is.

    Attributes:
        positions: that are read, side by side.
        before: positions of every row that lie in the cache.
        cu_seqlens, max_seqlen: borders and longest of the samples, where these are the rows (flat form).
    """

    positions: int
    before: int = 0
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None


@dataclass(frozen=True, kw_only=True)
class IntegrationConfig(Schema):
    """Base of all integration configs; a new one subclasses it beside its module and adds one YAML."""

    def build(
        self, vision_width: int, text_config: PreTrainedConfig, num_anchors: int, num_embeddings: int
    ) -> Integration:
        """The module, with fresh weights.

        Args:
            num_anchors, num_embeddings: of a view: what the selector hands on, and what stands in the text.

        Raises:
            UserError: a language model or connector that it does not go with.
        """
        raise NotImplementedError


class Integration(nn.Module):
    """Holds what is new; the language model's classes and weights stay as they are."""

    def attach(self, language_model: nn.Module) -> None:
        """Puts hooks on the layers that hear of views; without `ARGUMENT` they do nothing."""
        raise NotImplementedError

    def forward(self, anchors: Anchors, features: VisionFeatures) -> Tensor:
        """What is said of each view, (X, E, D) with D the language model's width."""
        raise NotImplementedError

    def split(self, said_XED: Tensor, num_embeddings: int) -> tuple[Tensor | None, Tensor]:
        """What was said: the part that belongs to placeholders, (X, num_embeddings, D) or None, and the rest."""
        raise NotImplementedError

    def argument(self, placed: Placed, rows: Rows, direct_BSD: Tensor | None) -> Any:
        """What the layers are handed in one forward.

        Args:
            placed: the rest of what was said.
            direct_BSD: what belongs to placeholders at theirs, 0 elsewhere; None where no position that is read is one.
        """
        raise NotImplementedError


def place(
    said_XED: Tensor, placeholder_BS: Tensor, num_embeddings: int, cu_seqlens: Tensor | None = None, *,
    keeps: bool = False,
) -> Placed:  # fmt: skip
    """Finds where views begin: each at the first of its placeholders.

    The host waits for the device once, for the number of views in the fullest row.

    Args:
        said_XED: what layers read of all views, in the order of their placeholders.
        placeholder_BS: bool, which positions are placeholders; `num_embeddings` of each view.
        cu_seqlens: borders of the samples, which are the rows then.
        keeps: whether layers may keep what they make of the views.
    """
    device, views = placeholder_BS.device, said_XED.shape[0]
    width = placeholder_BS.shape[1]
    number_S = placeholder_BS.flatten().cumsum(0)
    view_X = torch.arange(views, device=device)
    start_X = torch.searchsorted(number_S, view_X * num_embeddings + 1)
    if cu_seqlens is None:
        rows = placeholder_BS.shape[0]
        row_X = start_X // width
        start_X = start_X - row_X * width
    else:
        rows = cu_seqlens.numel() - 1
        borders = cu_seqlens.long()
        row_X = torch.searchsorted(borders[1:], start_X, right=True)
        start_X = start_X - borders[row_X]
    count_R = torch.zeros(rows, dtype=torch.int64, device=device).index_add_(0, row_X, torch.ones_like(row_X))
    most = int(count_R.max()) if views > 1 else views
    place_X = view_X - (count_R.cumsum(0) - count_R)[row_X]
    view_RW = torch.full((rows, most), -1, dtype=torch.int64, device=device)
    start_RW = torch.zeros_like(view_RW)
    view_RW[row_X, place_X] = view_X
    start_RW[row_X, place_X] = start_X
    return Placed(said_XED, view_RW, start_RW, {} if keeps else None)


def placed_nowhere(said_XED: Tensor, rows: int) -> Placed:
    """Views that no row shows: they take part in the graph, and nothing of them is seen."""
    nowhere_R1 = torch.full((rows, 1), -1, dtype=torch.int64, device=said_XED.device)
    return Placed(said_XED, nowhere_R1, torch.zeros_like(nowhere_R1))
