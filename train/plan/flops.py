"""The floating-point operations of training: what the plan and MFU both count."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from train.choices import Part
from train.plan.shapes import Shapes, TextShape, VisionShape


@dataclass(frozen=True, kw_only=True)
class Work:
    """An amount of data, of a sample or of a whole step.

    Attributes:
        positions: of the language model, anchors counted.
        squares: sum over the samples of their positions squared, which is what attention pays for.
        supervised: positions whose next token is a target.
        images: tiles through vision tower and connector.
        looks: sum over the samples of their positions times their tiles, which is what looking at all visual tokens
            pays for; only an integration does.
    """

    positions: float
    squares: float
    supervised: float
    images: float
    looks: float = 0.0

    @classmethod
    def of_sample(
        cls, shapes: Shapes, *, text: float, supervised: float, images: float, tiles: float | None = None
    ) -> Work:
        """One sample of `text` positions that are not images; where no `tiles` are said, each has the most."""
        tiles = images * (shapes.tiles if tiles is None else tiles)
        positions = text + (images if shapes.view > 1 else tiles) * shapes.connector.queries
        return cls(
            positions=positions, squares=positions**2, supervised=supervised, images=tiles, looks=positions * tiles
        )  # fmt: skip


def model_flops(shapes: Shapes, trains: Collection[Part], work: Work) -> dict[Part, float]:
    """Forward and backward per part; a product of an (m, k) and a (k, n) matrix counts 2 m k n, all else nothing.

    Backward costs a forward for the gradient of a part's input, needed wherever something in it or before it is
    trained, and another one for the gradient of its weights, where they are trained. Causal attention counts half of
    its square. Activations computed a second time are not useful work and do not count (`recomputed_flops`). Source:
    the accounting of PaLM's appendix B, arXiv 2204.02311.
    """
    sees, connects, speaks = (part in trains for part in (Part.vision_tower, Part.connector, Part.language_model))
    integrates = Part.integration in trains
    times = {
        Part.vision_tower: 3 if sees else 1, Part.connector: 1 + connects + (connects or sees),
        Part.integration: 1 + integrates + (integrates or sees), Part.language_model: 2 + speaks,
    }  # fmt: skip
    return {part: times[part] * flops for part, flops in forward_flops(shapes, work).items()}


def recomputed_flops(shapes: Shapes, work: Work) -> float:
    """What activation checkpointing of the language model's layers adds: their forward a second time."""
    return forward_flops(shapes, work)[Part.language_model] - _head(shapes.text, work.supervised)


def forward_flops(shapes: Shapes, work: Work) -> dict[Part, float]:
    """Forward alone, per part that the model has; looking at visual tokens is the language model's."""
    vision, text, views = shapes.vision, shapes.text, work.images / shapes.view
    forward = {Part.vision_tower: work.images * _image(vision), Part.connector: views * shapes.connector.flops}
    layers = text.layers * (2 * text.matrices * work.positions + 2 * text.query * work.squares)
    if shapes.integration is not None:
        forward[Part.integration] = views * shapes.integration.flops
        layers += shapes.integration.looking(text, work.positions, views, work.looks / shapes.view)
    return {**forward, Part.language_model: layers + _head(text, work.supervised)}


def _image(vision: VisionShape) -> float:
    tokens, width = vision.attended, vision.width
    block = 2 * tokens * (4 * width**2 + 2 * width * vision.inner) + 4 * tokens**2 * width
    return vision.layers * block + 2 * vision.patches * 3 * vision.patch**2 * width


def _head(text: TextShape, supervised: float) -> float:
    return 2 * text.width * text.vocabulary * supervised
