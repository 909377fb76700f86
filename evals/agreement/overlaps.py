"""The measurement: which patches each rule chooses on the same images, and the share that two rules have in common."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise

import torch
from torch import Tensor

from anchorformer.contracts import VisionFeatures, VisionNeeds
from anchorformer.errors import UserError
from anchorformer.images import ImageTransform, normalise
from anchorformer.selectors.anchor import AnchorSelectorConfig
from anchorformer.selectors.base import ClsAndPatchesConfig, PatchSelectorConfig, Selector, SelectorConfig
from anchorformer.vision import VisionTower
from data.images import load
from data.record import ImageRef
from data.sources.base import Source

Choosing = AnchorSelectorConfig | PatchSelectorConfig
"""Selectors that choose a number of patches."""


@dataclass(frozen=True)
class Overlap:
    """What pairs of rules have in common, averaged over images; rows and columns in the order of `names`.

    Attributes:
        share: patches that both chose, as a share of those that one chose.
        jaccard: patches that both chose, as a share of those that either chose.
    """

    names: tuple[str, ...]
    share: list[list[float]]
    jaccard: list[list[float]]


@dataclass(frozen=True)
class Eye:
    """A vision tower that can be tapped anywhere, and how it takes images: each as one padded square.

    Attributes:
        is_tiled: whether the model that it is of cuts images into tiles.
    """

    tower: VisionTower
    transform: ImageTransform
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device
    is_tiled: bool

    def count(self, config: SelectorConfig) -> int:
        """Patches that a selector chooses here, [CLS] not counted."""
        tower = self.tower
        return config.count(tower.num_tokens, tower.num_heads, tower.has_cls) - keeps_cls(config, tower.has_cls)

    def build(self, config: SelectorConfig) -> Selector:
        return config.build(self.tower.num_tokens, self.tower.num_heads, self.tower.has_cls)

    def features(self, needs: VisionNeeds, images: Sequence[ImageRef], batch_size: int) -> Iterator[VisionFeatures]:
        """What the tower says of the images, batch after batch."""
        tower = VisionTower(copy.deepcopy(self.tower.model), needs).requires_grad_(False).eval().to(self.device)
        pending = iter(images)
        while batch := list(islice(pending, batch_size)):
            pixels = torch.stack([self.transform(load(ref)) for ref in batch]).to(self.device)
            yield tower(normalise(pixels, self.mean, self.std))


def keeps_cls(config: SelectorConfig, has_cls: bool) -> bool:
    """Whether [CLS] is among the anchors."""
    return has_cls and isinstance(config, (AnchorSelectorConfig, ClsAndPatchesConfig))


def between_selectors(
    eye: Eye, selectors: Mapping[str, Choosing], images: Sequence[ImageRef], batch_size: int
) -> Overlap:
    """The selectors, read from as few forwards per image as go; they must choose the same number of patches."""
    found: dict[str, Tensor] = {}
    # A rule that adds up layers adds up whatever was tapped: rules that begin at other layers get a forward of theirs.
    for first in {config.needs.cls_attention_from for config in selectors.values()}:
        together = {name: one for name, one in selectors.items() if one.needs.cls_attention_from == first}
        built = [eye.build(config) for config in together.values()]
        needs = _union([config.needs for config in together.values()])
        batches = [
            torch.stack([_chosen(selector, features) for selector in built])
            for features in eye.features(needs, images, batch_size)
        ]
        found |= dict(zip(together, torch.cat(batches, dim=1), strict=True))
    return _overlap(tuple(selectors), torch.stack([found[name] for name in selectors]))


def between_layers(
    eye: Eye, config: Choosing, layers: Sequence[int], images: Sequence[ImageRef], batch_size: int
) -> Overlap:
    """One selector reading one layer after another."""
    rules = []
    for layer in layers:
        there = replace(config, layer=layer)
        selector = eye.build(there)
        rules.append(torch.cat([_chosen(selector, each) for each in eye.features(there.needs, images, batch_size)]))
    return _overlap(tuple(str(layer) for layer in layers), torch.stack(rules))


def spread(sources: Sequence[Source], wanted: int) -> list[ImageRef]:
    """At most so many different images, each the first of its record, evenly over the records of all sources.

    The records are cut into as many equal shares, and each gives its first image that no other one has given. Shares
    without such an image are made up for by further ones of the others.

    Raises:
        UserError: no record has one.
    """
    places = [(source, index) for source in sources for index in range(len(source))]
    borders = [share * len(places) // wanted for share in range(wanted + 1)]
    shares = [iter(places[start:end]) for start, end in pairwise(borders)]
    found: dict[ImageRef, None] = {}
    before = -1
    while before < len(found) < wanted:
        before = len(found)
        for share in shares:
            images = (ref for source, index in share for ref in source[index].images[:1])
            ref = next((ref for ref in images if ref not in found), None)
            if ref is not None:
                found[ref] = None
    if not found:
        raise UserError(
            "there are no images to look at", found=f"{len(places)} records without any", expected="1 or more",
            remedy="choose another data=",
        )  # fmt: skip
    return list(found)[:wanted]


def _chosen(selector: Selector, features: VisionFeatures) -> Tensor:
    """Which patches a selector chose, bool (B, P) on the host."""
    indices_BT = selector(features).indices_BT
    assert indices_BT is not None
    batch, tokens, _ = features.tokens_BNV.shape
    chosen_BN = torch.zeros(batch, tokens, dtype=torch.bool, device=indices_BT.device).scatter_(1, indices_BT, True)
    return chosen_BN[:, int(features.has_cls) :].cpu()


def _overlap(names: tuple[str, ...], chosen_RBP: Tensor) -> Overlap:
    sets_BRP = chosen_RBP.transpose(0, 1).double()
    both_BRR = sets_BRP @ sets_BRP.mT
    size_BR = sets_BRP.sum(-1)
    either_BRR = size_BR.unsqueeze(1) + size_BR.unsqueeze(2) - both_BRR
    share = (both_BRR / size_BR.unsqueeze(2)).mean(0)
    return Overlap(names, share.tolist(), (both_BRR / either_BRR).mean(0).tolist())


def _union(all_needs: Sequence[VisionNeeds]) -> VisionNeeds:
    """One forward for all of them; they read the same layer, and rows of [CLS] from the same one on."""
    return VisionNeeds(
        layer=all_needs[0].layer,
        cls_scores=any(needs.cls_scores for needs in all_needs),
        cls_attention_from=all_needs[0].cls_attention_from,
        received=any(needs.received for needs in all_needs),
        final=any(needs.final for needs in all_needs),
        image_key=any(needs.image_key for needs in all_needs),
    )
