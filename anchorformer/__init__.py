"""Two-stage training of large multimodal models with visual anchors: the model library.

`import anchorformer.auto` makes the classes known to transformers' `AutoModelForImageTextToText` and `AutoProcessor`.
Nothing heavy is imported here, so that a command can refuse a bad config before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "AnchorFormerConfig": "anchorformer.configuration",
    "AnchorFormerForConditionalGeneration": "anchorformer.modeling",
    "AnchorFormerProcessor": "anchorformer.processing",
    "UserError": "anchorformer.errors",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'anchorformer' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
