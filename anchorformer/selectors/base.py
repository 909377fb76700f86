"""What every selector is: a config that declares what it needs, and a module from vision features to anchors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from anchorformer.contracts import Anchors, VisionFeatures, VisionNeeds
from anchorformer.schema import Schema

PACKAGE = "anchorformer.selectors"


@dataclass(frozen=True, kw_only=True)
class SelectorConfig(Schema):
    """Base of all selector configs; a new selector subclasses it beside its module and adds one YAML."""

    layer: int = -2
    """Hidden state that tokens and scores are read from, counted as Hugging Face does (-2: the last but one block)."""

    @property
    def needs(self) -> VisionNeeds:
        """What the vision tower has to tap for this selector."""
        return VisionNeeds(layer=self.layer)

    def count(self, num_tokens: int, num_heads: int, has_cls: bool) -> int:
        """Anchors per image for a tower of `num_tokens` visual tokens ([CLS] counted) and `num_heads` heads.

        Raises:
            UserError: the tower cannot serve this selector (no [CLS], too few tokens, heads that do not divide T-1).
        """
        raise NotImplementedError

    def build(self, num_tokens: int, num_heads: int, has_cls: bool) -> Selector:
        """The module, after the checks of `count`."""
        raise NotImplementedError


class Selector(nn.Module):
    """Chooses the anchors of each image; a pure function of its input, without parameters or host synchronisation."""

    def forward(self, features: VisionFeatures) -> Anchors:
        raise NotImplementedError
