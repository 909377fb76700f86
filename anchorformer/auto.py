"""Importing this module makes the model, its configuration and its processor known to transformers' Auto classes."""

from __future__ import annotations

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.processing import AnchorFormerProcessor

__all__ = ["AnchorFormerConfig", "AnchorFormerForConditionalGeneration", "AnchorFormerProcessor"]
