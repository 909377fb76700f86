"""Images that are looked at once and asked about often: what was read about them is not read again."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from anchorformer.contracts import VisionFeatures
from anchorformer.decoding.base import Decoding, Sight
from anchorformer.decoding.greedy import Greedy
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.writer import Turns


@torch.no_grad()
def look(
    decoding: Decoding, processor: AnchorFormerProcessor, images: Sequence[Image.Image],
    features: Callable[[Tensor], VisionFeatures] | None = None,
) -> list[Sight]:  # fmt: skip
    """Looks at all images at once. Of each, `counts` goes to the processor as `token_counts`, and `embeds` to the model
    as `image_embeds`.

    Args:
        features: says of uint8 tiles what the vision tower would; None runs it.

    Raises:
        UserError: an image that is too large.
    """
    if not images:
        return []
    transform, device = processor.image_transform, decoding.model.device
    tiles_B3HW, tile_counts = transform.tiles(images), [transform.count(image.size) for image in images]
    known = None if features is None else features(tiles_B3HW).map(lambda tensor: tensor.to(device))
    sight = decoding.see(tiles_B3HW.to(device), tile_counts, known)
    return sight.split([transform.tiling.views(tiles) for tiles in tile_counts])


class Seen:
    """Some images, with their visual embeddings and the keys and values of the last prompt about them.

    A prompt is read from where it differs from the one before: behind system text and images where these stand first,
    behind everything said so far where a conversation goes on. Prompts are compared as ids, so that it holds for every
    template. Answers are those of `model.generate` without any of this.

    Threads that ask at the same time wait for each other.

    Args:
        model: in evaluation mode; its weights must stay as they are.
        images: what every prompt is about, in order; may be none.
        decoding: of this model; None is greedy.
    """

    def __init__(
        self, model: AnchorFormerForConditionalGeneration, processor: AnchorFormerProcessor,
        images: Sequence[Image.Image], decoding: Decoding | None = None,
    ) -> None:  # fmt: skip
        self.images = tuple(images)
        self._decoding = decoding or Greedy(model)
        self._model, self._processor = model, processor
        self._asking = threading.Lock()
        self._ids_S = torch.empty(0, dtype=torch.int64)
        self._cache = DynamicCache()

    @cached_property
    def sights(self) -> list[Sight]:
        """What is seen of each image, all of them at once; made at first use."""
        return look(self._decoding, self._processor, self.images)

    @property
    def image_embeds(self) -> Tensor:
        """What `encode_images` says of them, for `generate` and `forward` of any batch that shows these images."""
        sight = Sight.of(self.sights)
        return torch.empty(0, self._model.config.text_config.hidden_size) if sight is None else sight.embeds

    @property
    def token_counts(self) -> list[tuple[int, ...]] | None:
        """What the processor has to be told of these images; where it knows, they are not looked at for that."""
        return [each.counts for each in self.sights] if self._processor.needs_token_counts else None

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
            mask_BS, sight = torch.ones_like(ids_BS), Sight.of(self.sights)
            cache = self._take(ids_S)
            read_S: Tensor = self._model.generate(
                input_ids=ids_BS, attention_mask=mask_BS, image_embeds=None if sight is None else sight.embeds,
                past_key_values=cache, use_cache=True, num_beams=1, num_return_sequences=1,
                logits_processor=self._decoding.logits_processors(ids_BS, mask_BS, sight),
                eos_token_id=self._processor.stop_token_ids, **settings,
            )[0].cpu()  # fmt: skip
            # The last token was chosen and never read.
            self._ids_S, self._cache = read_S[: cache.get_seq_length()], cache
        return read_S[len(ids_S) :]

    def _take(self, ids_S: Tensor) -> DynamicCache:
        """The cache, cut to what this prompt shares with it.

        It is put back when the prompt was read: one that a failure left half filled is never used.
        """
        cache, read_S = self._cache, self._ids_S
        self._cache, self._ids_S = DynamicCache(), read_S[:0]
        most = min(len(read_S), len(ids_S) - 1)  # the last position is read anew: its logits give the first token
        differs = (read_S[:most] != ids_S[:most]).nonzero()
        known = int(differs[0]) if len(differs) else most
        ends = [0, *accumulate(count for each in self.sights for count in each.counts)]
        positions = self._count_images(ids_S[:known])
        known -= positions - ends[bisect_right(ends, positions) - 1]  # no part of a view
        if known < len(read_S):
            cache.crop(known - len(read_S))
        return cache

    def _count_images(self, ids_S: Tensor) -> int:
        return int((ids_S == self._processor.image_token_id).sum())
