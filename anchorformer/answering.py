"""An answer while it is generated: its text piece by piece, its ids, and how long it took."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from anchorformer.errors import UserError
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.seen import Seen
from anchorformer.writer import Turns

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What stands at the end of decoded text as long as its last character is incomplete."""


class Answer:
    """Greedy, as `python -m evals` answers. Iterating generates it and gives pieces of text; leaving early stops it.

    A piece is never half a character, special tokens are in none, nor is white space before the first word; joined, the
    pieces are `text`.

    Args:
        images: of the turns' placeholders; where several answers are about the same ones, as one `Seen`, so that each
            reads only what the one before it had not.

    Attributes:
        inputs: what the model reads, on its device.
        ids: tokens so far, the stop among them once it is there.
        text: what they say.
        first_token_s: seconds from the start to the first token, the image included; None before it is there.
        seconds: from the start to the newest token.

    Raises:
        UserError: turns and images do not match, or there is no room for an answer behind them.
    """

    def __init__(
        self, model: AnchorFormerForConditionalGeneration, processor: AnchorFormerProcessor, turns: Turns,
        images: Sequence[Image.Image] | Seen, *, max_new_tokens: int = 256,
    ) -> None:  # fmt: skip
        if max_new_tokens < 1:
            raise UserError(
                "an answer has no room", found=f"max_new_tokens={max_new_tokens}", expected="at least 1",
                remedy="leave it out, or raise it",
            )  # fmt: skip
        self._model, self._processor, self._turns = model, processor, turns
        self._seen = images if isinstance(images, Seen) else Seen(model, processor, images)
        start = time.perf_counter()
        counts = self._seen.token_counts
        self._looked_s = time.perf_counter() - start
        self.inputs: BatchFeature = processor([self._seen.images], conversations=[turns], token_counts=counts)
        self.inputs = self.inputs.to(model.device)
        self._max_new_tokens = min(max_new_tokens, self._room())
        self.ids: list[int] = []
        self.text = ""
        self.first_token_s: float | None = None
        self.seconds = 0.0

    def _room(self) -> int:
        length = self.inputs["input_ids"].shape[1]
        longest = self._model.config.text_config.max_position_embeddings
        if length >= longest:
            raise UserError(
                "the conversation is too long for the language model", found=f"{length} positions",
                expected=f"fewer than {longest}", remedy="begin a new conversation",
            )  # fmt: skip
        return int(longest - length)

    def __iter__(self) -> Iterator[str]:
        """
        Raises:
            Exception: what generation raised in its own thread.
        """
        tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        left, failed = threading.Event(), list[Exception]()
        worker = threading.Thread(target=self._generate, args=(tokens, left, failed), daemon=True)
        start = time.perf_counter() - self._looked_s
        worker.start()
        try:
            while (token := tokens.get()) is not None:
                self.ids.append(token)
                self.seconds = time.perf_counter() - start
                self.first_token_s = self.first_token_s or self.seconds
                yield from self._more(is_last=False)
            yield from self._more(is_last=True)
        finally:
            left.set()
            worker.join()
        if failed:
            raise failed[0]

    def _generate(self, tokens: queue.SimpleQueue[int | None], left: threading.Event, failed: list[Exception]) -> None:
        try:
            self._seen.generate(
                self._turns, do_sample=False, max_new_tokens=self._max_new_tokens, streamer=_Tokens(tokens),
                stopping_criteria=StoppingCriteriaList([_WhenLeft(left)]),
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 (raised again where the answer is read)
            failed.append(error)
        finally:
            tokens.put(None)

    def _more(self, *, is_last: bool) -> Iterator[str]:
        # All of it anew each time: how a token reads may depend on the one before it.
        text = self._processor.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()
        if text.endswith(REPLACEMENT):
            if not is_last:
                return
            text = text.rstrip(REPLACEMENT)  # the rest of it never came
        new, self.text = text[len(self.text) :], text
        if new:
            yield new


class _Tokens(BaseStreamer):
    """Hands on the new tokens of one row; `generate` puts the prompt first."""

    def __init__(self, tokens: queue.SimpleQueue[int | None]) -> None:
        self._tokens, self._has_prompt = tokens, False

    def put(self, value: Tensor) -> None:
        if self._has_prompt:
            for token in value.flatten().tolist():
                self._tokens.put(token)
        self._has_prompt = True

    def end(self) -> None:
        """The end is told by the thread, also where `generate` fails."""


class _WhenLeft(StoppingCriteria):
    """Stops once nobody reads the answer any more."""

    def __init__(self, left: threading.Event) -> None:
        self._left = left

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return torch.full((input_ids.shape[0],), self._left.is_set(), dtype=torch.bool, device=input_ids.device)
