"""What every selector is: a config that declares what it needs, and a module from vision features to anchors."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from anchorformer.contracts import Anchors, VisionFeatures, VisionNeeds
from anchorformer.errors import UserError
from anchorformer.kernels.selection import select_anchors
from anchorformer.schema import Schema

PACKAGE = "anchorformer.selectors"


@dataclass(frozen=True, kw_only=True)
class SelectorConfig(Schema):
    """Base of all selector configs; a new selector subclasses it beside its module and adds one YAML."""

    spans_tiles: ClassVar[bool] = False
    """Whether the rule holds for patches in any arrangement, so that all tiles of an image can be one view."""
    ragged: ClassVar[bool] = False
    """Whether images have different numbers of anchors, by what they show; it builds a `RaggedSelector`."""

    layer: int = -2
    """Hidden state that tokens and scores are read from, counted as Hugging Face does (-2: the last but one block)."""

    @property
    def needs(self) -> VisionNeeds:
        """What the vision tower has to tap for this selector."""
        return VisionNeeds(layer=self.layer)

    @property
    def needs_cls(self) -> bool:
        """Whether the selector only works on towers with a [CLS] token."""
        return self.needs.cls

    def count(self, num_tokens: int, num_heads: int, has_cls: bool) -> int:
        """Anchors per image for a tower of `num_tokens` visual tokens ([CLS] counted) and `num_heads` heads; where
        images have different numbers, the largest that is possible.

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


class RaggedSelector(Selector):
    """Chooses another number of tokens for every image; the host waits for these numbers where they are not known.

    A choice may hang on the last bit of a matrix product, and text is laid out by its size. So it can be made once,
    right behind the tower, and kept with the features (`decided`): whatever reads them selects the same tokens.
    """

    def choose(self, features: VisionFeatures) -> Tensor:
        """The anchors of each image, at least one: bool (B, N), without host synchronisation."""
        raise NotImplementedError

    def decided(self, features: VisionFeatures) -> VisionFeatures:
        """The tokens and which of them are chosen, without what only the choice needs."""
        return VisionFeatures(features.tokens_BNV, None, features.has_cls, chosen_BN=self.choose(features))

    def forward(self, features: VisionFeatures) -> Anchors:
        chosen_BN = self.choose(features) if features.chosen_BN is None else features.chosen_BN
        sizes = features.num_chosen or tuple(chosen_BN.sum(1).tolist())
        # A stable sort puts the chosen tokens first, in their order; shorter rows repeat their last one.
        indices_BN = (~chosen_BN).byte().argsort(dim=1, stable=True)
        places_BT = torch.arange(max(sizes, default=0), device=chosen_BN.device).expand(len(sizes), -1)
        places_BT = places_BT.minimum(chosen_BN.sum(1, keepdim=True) - 1)
        return replace(anchors_at(features, indices_BN.gather(1, places_BT)), sizes=sizes)


@dataclass(frozen=True, kw_only=True)
class PatchSelectorConfig(SelectorConfig):
    """Base of the selectors that choose a free number of patches, without [CLS]."""

    spans_tiles = True

    num_anchors: Annotated[int, Field(ge=1)] = 144
    """T, all of them patches: [CLS] is not kept."""

    def count(self, num_tokens: int, num_heads: int, has_cls: bool) -> int:
        """
        Raises:
            UserError: no [CLS] where the rule reads it; more anchors than patches.
        """
        self._check_cls(has_cls)
        return self._fitting(0, num_tokens - has_cls)

    def _check_cls(self, has_cls: bool) -> None:
        if self.needs_cls:
            require_cls(type(self).__module__.rpartition(".")[2], has_cls)

    def _fitting(self, extra: int, patches: int) -> int:
        """T, of which `extra` are no patches."""
        if not 1 <= self.num_anchors - extra <= patches:
            raise UserError(
                f"num_anchors={self.num_anchors} does not fit this vision tower",
                found=f"{patches} patches" + (" and [CLS], which is kept" if extra else ""),
                expected=f"{1 + extra} to {patches + extra}",
                remedy=f"set num_anchors={max(1 + extra, min(self.num_anchors, patches + extra))}",
            )
        return self.num_anchors


@dataclass(frozen=True, kw_only=True)
class ClsAndPatchesConfig(PatchSelectorConfig):
    """Base of the selectors that keep [CLS], where the tower has one, beside a free number of patches."""

    num_anchors: Annotated[int, Field(ge=1)] = 145
    """T, [CLS] counted where the tower has one."""

    def count(self, num_tokens: int, num_heads: int, has_cls: bool) -> int:
        """
        Raises:
            UserError: no [CLS] where the rule reads it; more anchors than tokens, or none beside [CLS].
        """
        self._check_cls(has_cls)
        return self._fitting(int(has_cls), num_tokens - has_cls)


class PatchSelector(Selector):
    """The patches of the highest score, ascending; equal scores go to the lower index. [CLS] is not kept."""

    keeps_cls = False

    def __init__(self, num_anchors: int) -> None:
        super().__init__()
        self.num_anchors = num_anchors

    def scores(self, features: VisionFeatures) -> Tensor:
        """One score per patch, (B, P), ranked in fp32."""
        raise NotImplementedError

    def forward(self, features: VisionFeatures) -> Anchors:
        scores_BP = self.scores(features)
        cls = int(self.keeps_cls and features.has_cls)
        # The anchor rule with one head: behind a column for [CLS], which it always takes.
        chosen = select_anchors(F.pad(scores_BP.float(), (1, 0)).unsqueeze(1), self.num_anchors - cls + 1)
        indices_BT = chosen[:, 1 - cls :] if features.has_cls else chosen[:, 1:] - 1
        return anchors_at(features, indices_BT)


class ClsAndPatches(PatchSelector):
    """[CLS] where the tower has one, then the patches of the highest score, ascending; ties as above."""

    keeps_cls = True


def anchors_at(features: VisionFeatures, indices_BT: Tensor) -> Anchors:
    """The tokens at these indices into N, unchanged."""
    return Anchors(vectors_at(features.tokens_BNV, indices_BT), indices_BT)


def vectors_at(x_BNV: Tensor, indices_BT: Tensor) -> Tensor:
    """Of N vectors those at these indices: (B, T, V)."""
    return x_BNV.gather(1, indices_BT.unsqueeze(-1).expand(-1, -1, x_BNV.shape[-1]))


def patches_of(x_BN: Tensor, features: VisionFeatures) -> Tensor:
    """Of something per token, (B, N) or (B, N, V), what belongs to patches."""
    return x_BN[:, int(features.has_cls) :]


def needed(tapped: Tensor | None) -> Tensor:
    """What the tower was to tap.

    Raises:
        ValueError: it did not, because it was built for another selector.
    """
    if tapped is None:
        raise ValueError("the vision tower did not tap this; build it with this selector's `needs`")
    return tapped


def names_without_cls() -> list[str]:
    """Names (files) of the selectors that serve a tower without [CLS], read from the package for error messages."""
    import anchorformer.selectors as package

    names = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        own = [cls for cls in _subclasses(SelectorConfig) if cls.__module__ == module.__name__]
        if module.__name__ != __name__ and any(not cls().needs_cls for cls in own):
            names.append(info.name)
    return names


def _subclasses(cls: type[SelectorConfig]) -> Iterator[type[SelectorConfig]]:
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


def require_cls(selector: str, has_cls: bool) -> None:
    """
    Raises:
        UserError: as `without_cls`.
    """
    if not has_cls:
        raise without_cls(f"selector '{selector}'", "a vision tower")


def without_cls(selector: str, tower: str) -> UserError:
    """The tower has no [CLS]; names the selectors that do without."""
    return UserError(
        f"{selector} ranks patches by [CLS]", found=f"{tower} without [CLS]",
        expected=f"a tower with [CLS], or one of the selectors {names_without_cls()}",
        remedy="choose another vision tower (CLIP, DINOv2) or another selector",
    )  # fmt: skip
