"""Conversations written down as ids and labels, in one pass and segment by segment, so that they cannot disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from anchorformer.contracts import IGNORE_INDEX
from anchorformer.dialogue import PLACEHOLDER, read_turns
from anchorformer.errors import UserError
from anchorformer.templates import Picture, Segment, Special, Template, Text
from anchorformer.tokenization import After, TextEncoder

Turns = Sequence[tuple[str, str]]
"""(role, text) in order; roles are `system` (first, optional), `user` and `assistant`."""

_OVERLENGTH = ("error", "drop", "truncate_answer")


@dataclass(frozen=True)
class Writer:
    """A template, a tokenizer and what stands for an image; `placeholders` says how often, for each image."""

    template: Template
    encoder: TextEncoder
    tokenizer: PreTrainedTokenizerBase
    image_token_id: int

    def labelled(self, turns: Turns, placeholders: Sequence[int], sample_id: str) -> tuple[list[int], list[int]]:
        """Ids and labels of a sample, of any length.

        Raises:
            UserError: turns that do not alternate, or placeholders and images that do not match.
        """
        return self.ids(self.answered(turns, len(placeholders), sample_id), placeholders)

    def sample(
        self, turns: Turns, placeholders: Sequence[int], sample_id: str, max_length: int | None, overlength: str
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of a sample that is at most `max_length` long, cut where `overlength` allows it.

        Raises:
            UserError: it is too long and may not be cut, or cannot be; and as `labelled`.
        """
        ids, labels = self.labelled(turns, placeholders, sample_id)
        kept = self.kept_length(ids, labels, max_length, overlength)
        if max_length is not None and kept > max_length:
            supervised = sum(label != IGNORE_INDEX for label in labels)
            raise UserError(
                f"{sample_id}: the sample is too long",
                found=f"{len(ids)} positions ({sum(placeholders)} of them image tokens, {supervised} "
                f"supervised) with overlength={overlength}",
                expected=f"at most {max_length}"
                + (" with every image token and at least one target" if overlength == "truncate_answer" else ""),
                remedy="raise data.max_length, or set data.overlength to drop or truncate_answer",
            )
        return ids[:kept], labels[:kept]

    def answered(self, turns: Turns, num_images: int, sample_id: str) -> list[Segment]:
        """The segments of a conversation that ends as it stands.

        Raises:
            UserError: as `labelled`.
        """
        return self.template.segments(read_turns(turns, num_images, sample_id), generate=False)

    def asking(self, turns: Turns, num_images: int, sample_id: str) -> list[Segment]:
        """The segments of a conversation up to and including the generation prompt.

        Raises:
            UserError: the last turn is not the user's, and as `labelled`.
        """
        dialogue = read_turns(turns, num_images, sample_id)
        if dialogue.exchanges[-1].answer is not None:
            raise UserError(
                f"{sample_id}: nothing is asked", found="a conversation that ends with an answer",
                expected="a user's turn at the end", remedy="leave the reference answer out of the prompt",
            )  # fmt: skip
        return self.template.segments(dialogue, generate=True)

    def text(self, segments: Sequence[Segment]) -> str:
        """Segments as one text that `read` reads: images as placeholders, no BOS of their own."""
        texts = []
        segments = segments[1:] if segments[:1] == [Special(self.tokenizer.bos_token_id)] else segments
        for segment in segments:
            match segment:
                case Text(text):
                    texts.append(text)
                case Special(index):
                    texts.append(self.tokenizer.convert_ids_to_tokens(index))
                case Picture():
                    texts.append(PLACEHOLDER)
        return "".join(texts)

    def read(self, text: str, placeholders: Sequence[int]) -> list[int]:
        """Ids of a prompt that is written out already; BOS is put in front where it is missing."""
        bos = self.tokenizer.bos_token
        missing = bos is not None and not text.startswith(bos)
        segments: list[Segment] = [Special(self.tokenizer.bos_token_id)] if missing else []
        for index, piece in enumerate(text.split(PLACEHOLDER)):
            segments += [Picture()] * (index > 0) + [Text(piece, self.template.after_image if index else After.nothing)]
        return self.ids(segments, placeholders)[0]

    def ids(self, segments: Sequence[Segment], placeholders: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids and labels; the pictures among the segments are the images, in order."""
        ids: list[int] = []
        labels: list[int] = []
        counts = iter(placeholders)
        for segment in segments:
            match segment:
                case Text(text, after, supervised):
                    new = self.encoder.encode(text, after)
                case Special(index, supervised):
                    new = [index]
                case Picture():
                    new, supervised = [self.image_token_id] * next(counts), False
            ids += new
            labels += new if supervised else [IGNORE_INDEX] * len(new)
        return ids, labels

    def kept_length(self, ids: Sequence[int], labels: Sequence[int], max_length: int | None, overlength: str) -> int:
        """Positions that stay; all of them where a cut is not allowed or would take image tokens or every target.

        Raises:
            UserError: no such rule.
        """
        if overlength not in _OVERLENGTH:
            raise UserError(
                "no such rule for over-length samples", found=overlength, expected=", ".join(_OVERLENGTH),
                remedy="set data.overlength",
            )  # fmt: skip
        if max_length is None or len(ids) <= max_length or overlength != "truncate_answer":
            return len(ids)
        cuts_image = self.image_token_id in ids[max_length:]
        has_target = any(label != IGNORE_INDEX for label in labels[:max_length])
        return len(ids) if cuts_image or not has_target else max_length
