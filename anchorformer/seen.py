"""Images that are looked at once and asked about often: what was read about them is not read again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from anchorformer.decoding.base import Decoding, Sight
from anchorformer.decoding.greedy import Greedy
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.writer import Turns


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

    @property
    def image_embeds(self) -> Tensor:
        """What `encode_images` says of them, for `generate` and `forward` of any batch with them; made at first use."""
        return self._sight.embeds_XTD

    @cached_property
    @torch.no_grad()
    def _sight(self) -> Sight:
        transform = self._processor.image_transform
        if not self.images:
            width = self._model.config.text_config.hidden_size
            return Sight(torch.empty(0, self._processor.num_image_tokens, width))
        counts = [transform.count(image.size) for image in self.images]
        return self._decoding.see(transform.tiles(self.images).to(self._model.device), counts)

    def generate(self, turns: Turns, **settings: Any) -> Tensor:
        """Ids (S,) of the answer, the stop among them once it is there.

        Args:
            turns: the whole conversation, with a placeholder for each image, and the user's turn at the end.
            settings: of `model.generate`, as `max_new_tokens`; one answer, without beams.

        Raises:
            UserError: placeholders and images that do not match, or nothing is asked.
        """
        ids_S = self._processor.prompt(turns, self.images)
        ids_BS = ids_S[None].to(self._model.device)
        mask_BS = torch.ones_like(ids_BS)
        with self._asking:
            cache = self._take(ids_S)
            read_S: Tensor = self._model.generate(
                input_ids=ids_BS, attention_mask=mask_BS, image_embeds=self.image_embeds,
                past_key_values=cache, use_cache=True, num_beams=1, num_return_sequences=1,
                logits_processor=self._decoding.logits_processors(ids_BS, mask_BS, self._sight),
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
        known -= self._count_images(ids_S[:known]) % self._processor.num_image_tokens  # no part of an image
        if known < len(read_S):
            cache.crop(known - len(read_S))
        return cache

    def _count_images(self, ids_S: Tensor) -> int:
        return int((ids_S == self._processor.image_token_id).sum())
