"""The one object that gives model input for conversations and images, to training, evaluation and others alike."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.contracts import IGNORE_INDEX, Example
from anchorformer.dialogue import PLACEHOLDER
from anchorformer.errors import UserError
from anchorformer.images import ImageTransform
from anchorformer.messages import Messages, read_messages
from anchorformer.placeholders import TokenCounts, deal, placeholders
from anchorformer.schema import parse, to_plain
from anchorformer.templates import make_template
from anchorformer.tiling import Size, Tiling
from anchorformer.tokenization import SENTENCEPIECE_FILE, After, SentencePieceEncoder, choose_encoder
from anchorformer.writer import Turns, Writer

log = logging.getLogger(__name__)

IMAGE_TOKEN = PLACEHOLDER
"""Name under which the image token is added to a tokenizer."""

_CHAT_HINTS = ("padding",)
"""Arguments of `apply_chat_template` that ask for what is done anyway."""


class Measure(NamedTuple):
    """What a sample costs, before its images are opened."""

    length: int
    """Positions, image tokens counted."""
    num_supervised: int


class AnchorFormerProcessor(ProcessorMixin):
    """Conversation template, tokenizer, placeholder expansion, labels and image transform behind one door.

    A sample is padded by its length, never by looking for the padding id, which may be a token that also occurs in
    text.

    Args:
        image_transform: image to uint8 tiles.
        tokenizer: of the language model; gets `image_token` as a special token where it has none.
        num_image_tokens: embeddings per view, the model's `num_image_tokens`: of a tile, or where the tiling selects
            over all tiles of an image, of an image. None where that depends on what a tile shows: `token_counts` has to
            say it then.
        image_token: name of the image token in the tokenizer.
        template: `plain`, `v1` or `chat`.

    Raises:
        UserError: the template does not fit the tokenizer, or the tokenizer's files do not fit each other.
    """

    def __init__(
        self,
        image_transform: ImageTransform,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int | None = 1,
        image_token: str = IMAGE_TOKEN,
        template: str = "v1",
        chat_template: str | None = None,
    ) -> None:
        # ProcessorMixin's own constructor only sorts attributes that transformers knows how to load; ours are set here.
        self.tokenizer, self.image_transform, self.chat_template = tokenizer, image_transform, chat_template
        self.num_image_tokens, self.image_token = num_image_tokens, image_token
        if image_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([image_token], special_tokens=True)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        self.encoder, reason = choose_encoder(tokenizer, image_token)
        log.info("text is encoded by: %s", reason)
        self._set_template(template)

    @property
    def _writer(self) -> Writer:
        return Writer(self._template, self.encoder, self.tokenizer, self.image_token_id)

    def _placeholders(self, tile_counts: Sequence[int], token_counts: TokenCounts | None, where: str) -> list[int]:
        return placeholders(tile_counts, self.image_transform.tiling, self.num_image_tokens, token_counts, where)

    def _set_template(self, name: str) -> None:
        self._template = make_template(name, self.tokenizer, tuple(self.encoder.specials))
        self.template = name

    def with_template(self, name: str) -> AnchorFormerProcessor:
        """The same processor with another conversation template (each stage names its own).

        Raises:
            UserError: no such template, or it does not fit the tokenizer.
        """
        other = copy.copy(self)
        other._set_template(name)
        return other

    @property
    def stop(self) -> str:
        """What ends an answer under this template; supervised with it."""
        return self._template.stop

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens at which generation ends: the last one of the template's stop, and the tokenizer's EOS."""
        eos = self.tokenizer.eos_token_id
        stop = self.encoder.encode(self.stop, After.text)[-1]
        return [stop] if eos in (None, stop) else [stop, eos]

    def encode(
        self, turns: Turns, images: Sequence[Image.Image], *, sample_id: str, max_length: int | None = None,
        overlength: str = "error", token_counts: TokenCounts | None = None,
    ) -> Example:  # fmt: skip
        """One training sample.

        Args:
            images: opened, in the order of the placeholders in the users' turns.
            token_counts: embeddings of each view of each image; needed where they depend on what is seen.
            sample_id: names the sample in messages.
            max_length: most positions, image tokens counted.
            overlength: beyond `max_length`, `truncate_answer` cuts the end of the sample; `error` and `drop` raise
                (dropping is planned with `measure`, before any sample is encoded).

        Raises:
            UserError: turns that do not alternate, placeholders and images that do not match, `token_counts` missing or
                of other images, or a sample longer than `max_length` that may not be cut, or cannot be without losing
                image tokens or its last target.
        """
        counts = [self.image_transform.count(image.size) for image in images]
        positions = self._placeholders(counts, token_counts, sample_id)
        ids, labels = self._writer.sample(turns, positions, sample_id, max_length, overlength)
        return Example(
            sample_id=sample_id,
            input_ids_S=torch.tensor(ids, dtype=torch.int64),
            labels_S=torch.tensor(labels, dtype=torch.int64),
            tiles_B3HW=self.image_transform.tiles(images),
            tile_counts=tuple(counts),
            token_counts=None if self.num_image_tokens is not None else tuple(chain.from_iterable(token_counts or ())),
        )

    def measure(
        self, turns: Turns, num_images: int, *, sizes: Sequence[Size | None] = (), sample_id: str = "record",
        max_length: int | None = None, overlength: str = "error", token_counts: TokenCounts | None = None,
    ) -> Measure:  # fmt: skip
        """Length and number of targets that `encode` would give, without pixels, for planning.

        Args:
            sizes: of the images, where `needs_sizes`; None of one that cannot be read, which is never encoded and
                counts as the fewest tiles.
            token_counts: as `encode` takes them; they tell how many tiles an image has, too.

        With `overlength=truncate_answer` the figures are those after the cut. A sample that `encode` would refuse as
        too long keeps its full length, so that `length > max_length` tells it apart whatever the rule.

        Raises:
            UserError: as `encode`, except for length.
            ValueError: sizes are needed and there are not as many as images.
        """
        transform = self.image_transform
        counts = [transform.tiling.counts[0]] * num_images
        if self.needs_sizes:
            pairs = zip(counts, sizes, strict=True)
            counts = [fewest if size is None else transform.count(size) for fewest, size in pairs]
        if token_counts is not None and self.needs_token_counts and len(token_counts) == num_images:
            counts = [len(own) for own in token_counts]
        writer = self._writer
        ids, labels = writer.labelled(turns, self._placeholders(counts, token_counts, sample_id), sample_id)
        kept = writer.kept_length(ids, labels, max_length, overlength)
        return Measure(kept, sum(label != IGNORE_INDEX for label in labels[:kept]))

    @property
    def needs_sizes(self) -> bool:
        """Whether a sample's length depends on the sizes of its images, and on nothing else of them."""
        return self.image_transform.tiling.needs_sizes and not self.needs_token_counts

    @property
    def needs_token_counts(self) -> bool:
        """Whether a sample's length depends on what its images show."""
        return self.num_image_tokens is None

    def prompt(
        self, turns: Turns, images: Sequence[Image.Image], *, sample_id: str = "prompt",
        token_counts: TokenCounts | None = None,
    ) -> Tensor:  # fmt: skip
        """Ids (S,) up to and including the generation prompt; training ids are these and the answer's.

        Args:
            token_counts: as `encode` takes them.

        Raises:
            UserError: the last turn is not the user's, and as `encode`.
        """
        counts = [self.image_transform.count(image.size) for image in images]
        segments = self._writer.asking(turns, len(images), sample_id)
        ids, _ = self._writer.ids(segments, self._placeholders(counts, token_counts, sample_id))
        return torch.tensor(ids, dtype=torch.int64)

    def pad(self, rows: Sequence[Tensor], *, side: str = "left") -> BatchFeature:
        """Rows of ids (S,) as `input_ids` and `attention_mask` (rows, longest), int64; left for generation."""
        token = self.tokenizer.pad_token_id
        token = (self.tokenizer.eos_token_id or 0) if token is None else token
        masks = [torch.ones_like(row) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return BatchFeature(
            {
                "input_ids": pad(list(rows), batch_first=True, padding_value=token, padding_side=side),
                "attention_mask": pad(masks, batch_first=True, padding_value=0, padding_side=side),
            }
        )

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        conversations: Sequence[Turns] | None = None,
        token_counts: TokenCounts | None = None,
        padding_side: str = "left",
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """The padded form that `generate` reads.

        Args:
            images: in the order of the placeholders over all samples, or one list per sample.
            text: prompts that are already written out; BOS is put in front where it is missing, placeholders stay where
                they stand.
            conversations: instead of `text`, turns that the template writes down, with the generation prompt.
            token_counts: embeddings of each view of each image, the images in order over all samples; needed where they
                depend on what is seen.
            return_tensors: "pt" is the only one.

        Returns:
            input_ids, attention_mask (int64, rows x longest); where there are images pixel_values (uint8, tiles x 3 x
            size x size, normalised by the model), and with a tiling tile_counts (list, tiles of each image).

        Raises:
            UserError: neither or both of `text` and `conversations`, images that do not match the placeholders,
                `token_counts` missing or of other images.
        """
        if (text is None) == (conversations is None) or return_tensors != "pt":
            raise UserError(
                "the processor was called without knowing what to write",
                found=f"text={text is not None}, conversations={conversations is not None}, {return_tensors=}",
                expected="exactly one of text and conversations, return_tensors='pt'", remedy="name one of them",
            )  # fmt: skip
        texts = [text] if isinstance(text, str) else text
        marked = texts or ["".join(said for role, said in turns if role == "user") for turns in conversations or ()]
        per_sample = deal(images, [sample.count(PLACEHOLDER) for sample in marked])
        flat = [image for own in per_sample for image in own]
        tile_counts = [self.image_transform.count(image.size) for image in flat]
        positions = iter(self._placeholders(tile_counts, token_counts, "prompt"))
        dealt = [[next(positions) for _ in own] for own in per_sample]
        writer = self._writer
        if texts is not None:
            read = [writer.read(sample, own) for sample, own in zip(texts, dealt, strict=True)]
        else:
            pairs = zip(conversations or (), dealt, strict=True)
            read = [writer.ids(writer.asking(turns, len(own), "prompt"), own)[0] for turns, own in pairs]
        batch = self.pad([torch.tensor(ids, dtype=torch.int64) for ids in read], side=padding_side)
        if flat:
            batch["pixel_values"] = self.image_transform.tiles(flat)
            if self.image_transform.tiling.grids:
                batch["tile_counts"] = tile_counts
        return batch

    def apply_chat_template(
        self, conversation: Messages | Sequence[Messages], chat_template: str | None = None, *,
        add_generation_prompt: bool = False, tokenize: bool = False, return_dict: bool = False,
        return_tensors: str = "pt", **others: Any,
    ) -> str | list[str] | Tensor | BatchFeature:  # fmt: skip
        """What transformers' pipelines and others call: conversations as messages, written by this model's template.

        Ids are those of `conversations=` with the same turns; see `read_messages` for how images are given.

        Args:
            conversation: messages, or a batch of such conversations.
            add_generation_prompt: whether the assistant is to answer; the user's turn is the last one then.
            tokenize: ids instead of text. Of the text of a first question `processor(text=..., images=...)` makes the
                same ids; it puts the BOS in front that the text leaves out.
            return_dict: everything that `generate` reads, not only ids.
            others: what transformers may ask for and nobody does here, at the value that asks for nothing.

        Raises:
            UserError: another template or anything of `others` is asked for, ids without a generation prompt, and as
                `read_messages` and `prompt`.
        """
        asked = {"chat_template": chat_template, **others}
        refused = {name: value for name, value in asked.items() if value and name not in _CHAT_HINTS}
        if refused or (tokenize and (not add_generation_prompt or return_tensors != "pt")):
            raise UserError(
                "the processor does not write conversations in this way",
                found=refused or f"{tokenize=}, {add_generation_prompt=}, {return_tensors=}",
                expected="the model's own template; ids with add_generation_prompt=True, return_tensors='pt'",
                remedy="leave the argument out; for labels call `encode`, for another template `with_template`",
            )  # fmt: skip
        single = not conversation or isinstance(conversation[0], Mapping)
        conversations: Sequence[Any] = [conversation] if single else conversation
        read = [read_messages(messages) for messages in conversations]
        if tokenize:
            batch = self([images for _, images in read], conversations=[turns for turns, _ in read])
            return batch if return_dict else batch["input_ids"]
        if add_generation_prompt:
            written = [self._writer.asking(turns, len(images), "prompt") for turns, images in read]
        else:
            written = [self._writer.answered(turns, len(images), "conversation") for turns, images in read]
        texts = [self._writer.text(segments) for segments in written]
        return texts[0] if single else texts

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "tile_counts"]

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json holds; the tokenizer has files of its own."""
        transform = self.image_transform
        return {
            "processor_class": type(self).__name__,
            "image_size": transform.image_size,
            "fill_rgb": list(transform.fill_rgb),
            **({"tiling": to_plain(transform.tiling)} if transform.tiling.grids else {}),
            "num_image_tokens": self.num_image_tokens,
            "image_token": self.image_token,
            "template": self.template,
        }

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> AnchorFormerProcessor:
        """What transformers calls with the loaded tokenizer and processor_config.json; keywords replace its values.

        Raises:
            UserError: one of the values that `to_dict` writes is not there.
        """
        values = {**processor_dict, **kwargs}
        names = ("num_image_tokens", "image_token", "template")
        missing = {"image_size", "fill_rgb", *names} - values.keys()
        if missing:
            raise UserError(
                "processor_config.json is incomplete", found=f"no {', no '.join(sorted(missing))}",
                expected="what this version's save_pretrained writes",
                remedy="copy the file from the model's folder again, or assemble the model",
            )  # fmt: skip
        tiling = parse(Tiling, values.get("tiling", {}), "tiling in processor_config.json", "copy the file again")
        transform = ImageTransform(values["image_size"], tuple(values["fill_rgb"]), tiling)
        return cls(transform, *args, **{name: values[name] for name in names})

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Writes processor_config.json and the tokenizer, with the SentencePiece model that transformers leaves out."""
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if isinstance(self.encoder, SentencePieceEncoder):
            (Path(save_directory) / SENTENCEPIECE_FILE).write_bytes(self.encoder.model)
        return files


AutoProcessor.register(AnchorFormerConfig, AnchorFormerProcessor)
