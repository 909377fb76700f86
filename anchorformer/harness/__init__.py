"""What lmms-eval finds under its entry point `lmms_eval.models`: where the model classes are."""

from __future__ import annotations

from typing import Any

NAME = "anchorformer"
"""What `python -m lmms_eval --model` takes."""


def manifest() -> Any:
    """The `ModelManifest` of both forms; the chat form is what lmms-eval takes unless it is told `--force_simple`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        NAME,
        simple_class_path=f"{__name__}.model.AnchorFormerSimple",
        chat_class_path=f"{__name__}.model.AnchorFormerChat",
    )
