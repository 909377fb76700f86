"""How much of everything a budget makes and trains; the hash of these numbers names the cached result."""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from anchorformer.schema import Schema, to_plain


@dataclass(frozen=True, kw_only=True)
class WorldConfig(Schema):
    """Size of the world on disk, in pictures per domain unless said otherwise."""

    captions: int = 4000
    """Pictures with a caption in `llava_pretrain`."""
    instruct: int = 4000
    """Pictures with a conversation in `llava_instruct`."""
    single: int = 1500
    """Chart and document pictures in `chartqa` and `docvqa`, whose formats ask one question per record."""
    val: int = 300
    """Held-out pictures."""
    questions_per_single: int = 2
    """Records per picture of `chartqa` and `docvqa`, training and held-out alike, and per held-out scene."""
    turns: int = 6
    """Most questions in one conversation."""
    text_only: int = 600
    """Conversations without an image in `llava_instruct`, over all domains."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ClipConfig(Schema):
    """The tiny CLIP: 96 px, patch 12, width 128, 4 layers, 4 heads, trained by contrast alone."""

    steps: int = 500
    batch: int = 64
    lr: float = 1.5e-3
    pictures: int = 24_000
    """Size of the pool that batches are drawn from."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(Schema):
    """The tiny Llama: width 128, 3 layers, 4 heads, trained on the world's text without images."""

    steps: int = 2000
    batch: int = 16
    length: int = 128
    """Most positions per row."""
    lr: float = 1.5e-3
    gate: float = 0.9
    """Least exact match on looking up fields of forms and shops of receipts in text; below it the build stops."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class MiniWorldConfig(Schema):
    """One budget: world, tokenizer and both backbones."""

    world: WorldConfig = field(default_factory=WorldConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    llama: LlamaConfig = field(default_factory=LlamaConfig)

    @property
    def digest(self) -> str:
        """Hash of every number here and of the code that interprets them."""
        hasher = hashlib.sha256(json.dumps(to_plain(self), sort_keys=True).encode())
        for path in sorted(Path(__file__).parent.glob("*.py")):
            if path.name not in _WITHOUT_EFFECT:
                hasher.update(_code_of(path.read_text(encoding="utf-8")).encode())
        return hasher.hexdigest()[:16]


def _code_of(source: str) -> str:
    """A source file without comments, docstrings and formatting, none of which change what it does."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # A bare constant is a docstring, of a function or of the field above it.
            kept = [part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


_WITHOUT_EFFECT = ("__main__.py", "__init__.py", "build.py")
"""Files that decide nothing about the result; editing them keeps the cache."""

BUDGETS: dict[str, MiniWorldConfig] = {
    "smoke": MiniWorldConfig(
        world=WorldConfig(captions=1000, instruct=1500, single=400, val=100, text_only=150),
        clip=ClipConfig(steps=200, pictures=6000),
        llama=LlamaConfig(steps=800, gate=0.0),
    ),
    "train": MiniWorldConfig(),
    "full": MiniWorldConfig(
        world=WorldConfig(captions=8000, instruct=8000, single=3000, val=500, text_only=1200),
        clip=ClipConfig(steps=1200),
        llama=LlamaConfig(steps=4000, gate=0.95),
    ),
}
