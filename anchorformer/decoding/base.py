"""What every way of decoding is: a config, and a companion of the model that looks at images and changes logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from transformers import LogitsProcessorList

from anchorformer.contracts import VisionFeatures
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.schema import Schema

PACKAGE = "anchorformer.decoding"


class DecodingConfig(Schema):
    """Base of all decoding configs; a new one subclasses it beside its class and adds one YAML."""

    def build(self, model: AnchorFormerForConditionalGeneration) -> Decoding:
        """The companion of a model in evaluation mode, whose weights it shares.

        Raises:
            UserError: a model that cannot be decoded this way.
        """
        raise NotImplementedError


class Sight(NamedTuple):
    """What answers about some images are generated from.

    Attributes:
        embeds_XTD: visual embeddings of each view, which the prompt has placeholders for.
        contrast_XKD: those of the same views that the decoding compares with; None where it compares with nothing.
    """

    embeds_XTD: Tensor
    contrast_XKD: Tensor | None = None


class Decoding:
    """Answers of a model are generated from what `see` says, with the logits processors that belong to the prompt."""

    def __init__(self, model: AnchorFormerForConditionalGeneration) -> None:
        self.model = model

    def see(
        self, tiles_B3HW: Tensor, tile_counts: Sequence[int] | None = None, features: VisionFeatures | None = None
    ) -> Sight:
        """Looks at uint8 tiles once; arguments as those of `encode_images`."""
        raise NotImplementedError

    def logits_processors(self, input_ids_BL: Tensor, mask_BL: Tensor, sight: Sight | None) -> LogitsProcessorList:
        """What `generate` is given for one prompt, padded on the left.

        Args:
            sight: of all views that the prompt has placeholders for, in their order; None where it has none.
        """
        raise NotImplementedError
