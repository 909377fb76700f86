"""What `python -m evals.agreement` can be told; imports no torch, so that a mistake is answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import yaml
from pydantic import Field

from anchorformer.schema import Schema
from data.config import DataConfig
from data.overrides import CONF, options

Count = Annotated[int, Field(ge=1, strict=True)]


@dataclass(frozen=True, kw_only=True)
class AgreementConfig(Schema):
    """Which selectors are compared, on which images; in fp32, on a GPU where there is one."""

    model: str
    """Run folder (its `model/` is taken) or model folder; its vision tower is looked through."""
    data: DataConfig
    """Where the images come from: the first one of each record."""
    selectors: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "anchor", "average", "received", "pca", "cls_similarity", "uniform", "random",
    )  # fmt: skip
    """Names of conf/selector that choose a number of patches; the layers are compared under the first of them."""
    patches: Count | None = None
    """Patches that each of them chooses, [CLS] not counted; null takes as many as the model's own selector."""
    images: Count = 100
    """Different images, spread evenly over the data."""
    layers: Annotated[int, Field(ge=2, strict=True)] = 10
    """Last layers of the tower that are compared with each other, or all where there are fewer."""
    batch_size: Count = 16
    """Images that the tower sees at once."""
    out: str | None = None
    """Folder of the report; null is `agreement` in the folder named by `model`."""


_MERGING = ("prumerge_plus", "visionzip")
"""Selectors whose anchors are no patches."""


def choosing() -> dict[str, dict[str, Any]]:
    """The selectors of conf/selector that choose a number of patches and are no variant of another one, by name."""
    specs = {
        name: yaml.safe_load((CONF / "selector" / f"{name}.yaml").read_text("utf-8")) for name in options("selector")
    }
    return {
        name: spec
        for name, spec in specs.items()
        if "num_anchors" in spec and "defaults" not in spec and name not in _MERGING
    }
