"""The names of the conversation templates, apart from what writes them, so that a config is checked without it."""

from __future__ import annotations

TEMPLATE_NAMES = ("plain", "v1", "chat")
