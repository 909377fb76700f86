"""Images that are looked at once and asked about often: what was read about them is not read again."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from anchorformer.contracts import VisionFeatures
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.writer import Turns


class Look(NamedTuple):
    """What the model has seen of one image.

    Attributes:
        rows_RD: visual embeddings of all of its views, end to end.
        counts: how many each view has; they add up to R.
    """

    rows_RD: Tensor
    counts: tuple[int, ...]


@torch.no_grad()
def look(
    model: AnchorFormerForConditionalGeneration, processor: AnchorFormerProcessor, images: Sequence[Image.Image],
    features: Callable[[Tensor], VisionFeatures] | None = None,
) -> list[Look]:  # fmt: skip
    """Looks at all images at once; what comes of them goes to the processor as `token_counts`, and to the model as
    `image_embeds`.

    Args:
        features: says of uint8 tiles what the vision tower would; None runs it.

    Raises:
        UserError: an image that is too large.
    """
    if not images:
        return []
    transform, device = processor.image_transform, model.device
    tiles_B3HW, tile_counts = transform.tiles(images), [transform.count(image.size) for image in images]
    known = None if features is None else features(tiles_B3HW).map(lambda tensor: tensor.to(device))
    rows_RD, counts = model.encode_views(tiles_B3HW.to(device), tile_counts, known)
    left = iter(counts)
    own = [tuple(next(left) for _ in range(transform.tiling.views(tiles))) for tiles in tile_counts]
    return [Look(*pair) for pair in zip(rows_RD.split([sum(each) for each in own]), own, strict=True)]


class Seen:
    """Some images, with their visual embeddings and the keys and values of the last prompt about them.

    A prompt is read from where it differs from the one before: behind system text and images where these stand first,
    behind everything said so far where a conversation goes on. Prompts are compared as ids, so that it holds for every
    template. Answers are those of `model.generate` without any of this.

    Threads that ask at the same time wait for each other.

    Args:
        model: in evaluation mode; its weights must stay as they are.
        images: what every prompt is about, in order; may be none.
    """

    def __init__(
        self, model: AnchorFormerForConditionalGeneration, processor: AnchorFormerProcessor,
        images: Sequence[Image.Image],
    ) -> None:  # fmt: skip
        self.images = tuple(images)
        self._model, self._processor = model, processor
        self._asking = threading.Lock()
        self._ids_S = torch.empty(0, dtype=torch.int64)
        self._cache = DynamicCache()

    @cached_property
    def looks(self) -> list[Look]:
        """Each image as the model has seen it, all of them at once; made at first use."""
        return look(self._model, self._processor, self.images)

    @property
    def image_embeds(self) -> Tensor:
        """(views, T, D), for `generate` and `forward` of any batch that shows these images; end to end (R, D) where
        views have different numbers of embeddings."""
        rows_RD, fixed = self._rows, self._processor.num_image_tokens
        return rows_RD if fixed is None else rows_RD.view(len(rows_RD) // fixed, fixed, rows_RD.shape[-1])

    @property
    def token_counts(self) -> list[tuple[int, ...]] | None:
        """What the processor has to be told of these images; where it knows, they are not looked at for that."""
        return [each.counts for each in self.looks] if self._processor.needs_token_counts else None

    @property
    def _rows(self) -> Tensor:
        if not self.looks:
            return torch.empty(0, self._model.config.text_config.hidden_size)
        return torch.cat([each.rows_RD for each in self.looks])

    def generate(self, turns: Turns, **settings: Any) -> Tensor:
        """Ids (S,) of the answer, the stop among them once it is there.

        Args:
            turns: the whole conversation, with a placeholder for each image, and the user's turn at the end.
            settings: of `model.generate`, as `max_new_tokens`; one answer, without beams.

        Raises:
            UserError: placeholders and images that do not match, or nothing is asked.
        """
        with self._asking:
            ids_S = self._processor.prompt(turns, self.images, token_counts=self.token_counts)
            ids_BS = ids_S[None].to(self._model.device)
            cache, known = self._take(ids_S)
            rows_RD = self._rows[self._count_images(ids_S[:known]) :]
            read_S: Tensor = self._model.generate(
                input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), image_embeds=rows_RD,
                past_key_values=cache, use_cache=True, num_beams=1, num_return_sequences=1,
                eos_token_id=self._processor.stop_token_ids, **settings,
            )[0].cpu()  # fmt: skip
            # The last token was chosen and never read.
            self._ids_S, self._cache = read_S[: cache.get_seq_length()], cache
        return read_S[len(ids_S) :]

    def _take(self, ids_S: Tensor) -> tuple[DynamicCache, int]:
        """The cache, cut to what this prompt shares with it, and how many positions that is.

        It is put back when the prompt was read: one that a failure left half filled is never used.
        """
        cache, read_S = self._cache, self._ids_S
        self._cache, self._ids_S = DynamicCache(), read_S[:0]
        most = min(len(read_S), len(ids_S) - 1)  # the last position is read anew: its logits give the first token
        differs = (read_S[:most] != ids_S[:most]).nonzero()
        known = int(differs[0]) if len(differs) else most
        ends = [0, *accumulate(count for each in self.looks for count in each.counts)]
        positions = self._count_images(ids_S[:known])
        known -= positions - ends[bisect_right(ends, positions) - 1]  # no part of a view
        if known < len(read_S):
            cache.crop(known - len(read_S))
        return cache, known

    def _count_images(self, ids_S: Tensor) -> int:
        return int((ids_S == self._processor.image_token_id).sum())
