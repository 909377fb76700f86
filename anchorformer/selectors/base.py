"""What every selector is: a config that declares what it needs, and a module from vision features to anchors."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

from torch import nn

from anchorformer.contracts import Anchors, VisionFeatures, VisionNeeds
from anchorformer.errors import UserError
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

    @property
    def needs_cls(self) -> bool:
        """Whether the selector only works on towers with a [CLS] token."""
        return self.needs.cls_scores

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


def names_without_cls() -> list[str]:
    """Names (files) of the selectors that serve a tower without [CLS], read from the package for error messages."""
    import anchorformer.selectors as package

    names = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        configs = [cls for cls in SelectorConfig.__subclasses__() if cls.__module__ == module.__name__]
        if any(not cls().needs_cls for cls in configs):
            names.append(info.name)
    return names


def require_cls(selector: str, has_cls: bool) -> None:
    """
    Raises:
        UserError: the tower has no [CLS]; names the selectors that do without.
    """
    if not has_cls:
        raise UserError(
            f"selector '{selector}' ranks patches by the attention of [CLS]",
            found="a vision tower without [CLS]",
            expected=f"a tower with [CLS], or one of the selectors {names_without_cls()}",
            remedy="choose another vision tower (CLIP, DINOv2) or another selector",
        )
