"""Which selectors are compared on a model's tower: all of them choose as many patches, in the layer that it taps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.errors import UserError
from anchorformer.images import ImageTransform
from anchorformer.parts import parse_tiling
from anchorformer.schema import parse_plugin
from anchorformer.selectors.base import PACKAGE, SelectorConfig
from anchorformer.weights import check_folder, load_tower
from evals.agreement.config import AgreementConfig, choosing
from evals.agreement.overlaps import Choosing, Eye, keeps_cls


def open_eye(folder: Path) -> tuple[Eye, SelectorConfig]:
    """The tower of a model folder with what its images go through, and the model's own selector.

    Raises:
        UserError: the folder is damaged or not one of ours.
    """
    check_folder(folder)
    model = AnchorFormerConfig.from_pretrained(folder)
    own = parse_plugin(SelectorConfig, model.selector, PACKAGE, "selector")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tower = load_tower(folder, torch.float32)
    transform = ImageTransform.for_statistics(tower.image_size, model.image_mean)
    is_tiled = bool(parse_tiling(model.tiling).grids)
    return Eye(tower, transform, model.image_mean, model.image_std, device, is_tiled), own


def rules(config: AgreementConfig, eye: Eye, own: SelectorConfig) -> tuple[dict[str, Choosing], dict[str, str]]:
    """The selectors that this tower can serve, by name, and why others are left out.

    Raises:
        UserError: nothing says how many patches are to be chosen, the number does not fit one of the selectors, or none
            is left.
    """
    if config.patches is None and not isinstance(own, Choosing):
        raise UserError(
            "how many patches are to be chosen?", found=f"a model with {type(own).__name__}, which does not say",
            expected="a number of patches", remedy="add patches=64",
        )  # fmt: skip
    patches = config.patches or eye.count(own)
    tower = eye.tower
    specs = choosing()
    fitting: dict[str, Choosing] = {}
    left_out: dict[str, str] = {}
    for name in config.selectors:
        # Counted from the front: the tower may have been cut behind the layer that it taps.
        spec = specs[name] | {"layer": tower.tapped_layer}
        rule = parse_plugin(SelectorConfig, spec, PACKAGE, f"conf/selector/{name}.yaml")
        assert isinstance(rule, Choosing)
        if rule.needs_cls and not tower.has_cls:
            left_out[name] = "the tower has no [CLS]"
        elif rule.needs.final and not tower.needs.final:
            left_out[name] = "the tower was cut behind its layer; assemble the model with selector=cls_similarity"
        else:
            fitting[name] = replace(rule, num_anchors=patches + keeps_cls(rule, tower.has_cls))
            eye.count(fitting[name])
    if not fitting:
        raise UserError(
            "no selector is left", found=left_out, expected="one that this tower can serve",
            remedy="add selectors=[received,pca,uniform,random]",
        )  # fmt: skip
    return fitting, left_out
