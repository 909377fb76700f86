"""One seam from text to ids: which tokenizer implementation speaks for a model, and what stands before each text."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers
from transformers import PreTrainedTokenizerBase

from anchorformer.errors import UserError

log = logging.getLogger(__name__)

SENTENCEPIECE_FILE = "tokenizer.model"

# Serialised protobuf messages merge when they are joined; this one says `normalizer_spec { add_dummy_prefix: false }`
# (fields 3 and 3 of sentencepiece_model.proto). sentencepiece has no call for it in every version since 0.2.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class After(Enum):
    """What a text comes after; it decides whether the tokenizer's dummy prefix space belongs in front of it."""

    nothing = "nothing"
    """Begins a tokenizer call of its own: the beginning of a sample, and in LLaVA's templates also after an image."""
    special = "special"
    """Directly after a special token."""
    text = "text"
    """Goes on where other text ended; never gets a prefix."""


class TextEncoder(Protocol):
    """Text to ids without any token of the tokenizer's own accord: BOS and EOS are the template's business."""

    specials: Mapping[str, int]
    """The special tokens that are recognised inside text, without the image token."""

    def encode(self, text: str, after: After) -> list[int]:
        """Ids of `text`; special tokens written out in it become their ids, the image token's name stays text."""
        ...


def choose_encoder(tokenizer: PreTrainedTokenizerBase, image_token: str) -> tuple[TextEncoder, str]:
    """The encoder for a tokenizer and the reason for it: SentencePiece itself where the model ships one, else the
    fast tokenizer.

    transformers 5 turns a Llama tokenizer into a fast one, whose ids differ from those that the published models were
    trained on wherever a text begins with a space (and, with `legacy: true`, after special tokens).

    Raises:
        UserError: the SentencePiece model holds another vocabulary than the tokenizer, or no fast tokenizer is there.
    """
    specials = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content != image_token
    }
    vocab_file = Path(getattr(tokenizer, "vocab_file", None) or "")
    if vocab_file.name == SENTENCEPIECE_FILE and vocab_file.is_file():
        legacy = _is_legacy(tokenizer, vocab_file.parent)
        # transformers 5 leaves `legacy` out when it saves a tokenizer; ids must not change by saving and loading.
        tokenizer.init_kwargs["legacy"] = legacy
        encoder = SentencePieceEncoder(vocab_file.read_bytes(), specials, legacy=legacy)
        encoder.check_vocabulary(tokenizer, vocab_file)
        return encoder, f"SentencePiece, legacy={str(legacy).lower()} ({vocab_file})"
    if not tokenizer.is_fast:
        raise UserError(
            "the tokenizer has no fast implementation", found=type(tokenizer).__name__,
            expected="a tokenizer.json, or a Llama tokenizer with its tokenizer.model",
            remedy="convert it with transformers and save it beside the language model",
        )  # fmt: skip
    return FastEncoder(tokenizer, specials, image_token), "fast tokenizer (no SentencePiece model beside it)"


def _is_legacy(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    if "legacy" in tokenizer.init_kwargs:
        return bool(tokenizer.init_kwargs["legacy"])
    config = folder / "tokenizer_config.json"
    declared = json.loads(config.read_text()).get("legacy") if config.is_file() else None
    if declared is None:
        # The slow tokenizer of transformers 4, with which these models were trained, took silence for true.
        log.info("%s does not say whether the tokenizer is legacy; taken as true, as transformers 4 did", config)
        return True
    return bool(declared)


class SentencePieceEncoder:
    """A SentencePiece model used as the slow Llama tokenizer of transformers 4 used it.

    `legacy` puts the dummy prefix space in front of every piece between special tokens; otherwise it stands only in
    front of a text that comes after nothing.
    """

    def __init__(self, model: bytes, specials: Mapping[str, int], *, legacy: bool) -> None:
        self.model, self.legacy = model, legacy
        self.specials: Mapping[str, int] = dict(specials)
        self._prefixing = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._plain = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        self._cut = _special_pattern(self.specials)
        # Without a prefix the normaliser may swallow leading spaces, so they are encoded behind something solid.
        self._shield = self._plain.id_to_piece(self._plain.unk_id())
        self._shield_length = len(self._plain.encode(self._shield))
        self._lone_space = self._plain.piece_to_id("▁")

    def __reduce__(self) -> tuple[Any, ...]:
        # From the model's bytes, for data workers: the processors inside cannot all be pickled.
        return _rebuild_sentencepiece, (self.model, self.specials, self.legacy)

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
        """Refuses a model file that numbers its pieces otherwise than the tokenizer does."""
        size = self._plain.get_piece_size()
        probes = sorted({0, 1, 2, size // 3, size // 2, size - 1})
        ours = [self._plain.id_to_piece(index) for index in probes]
        theirs = tokenizer.convert_ids_to_tokens(probes) if size <= len(tokenizer) else []
        if ours != theirs:
            raise UserError(
                f"{file} belongs to another tokenizer", found=f"{size} pieces, {ours}",
                expected=f"the {len(tokenizer)} tokens of the tokenizer beside it, {theirs}",
                remedy="copy all tokenizer files from one published model",
            )  # fmt: skip

    def encode(self, text: str, after: After) -> list[int]:
        if not text:
            return []
        prefix = after is After.nothing or (self.legacy and after is After.special)
        if prefix and not self.legacy:
            text = " " + text
        ids: list[int] = []
        for piece in self._cut.split(text) if self._cut else [text]:
            if piece in self.specials:
                ids.append(self.specials[piece])
                prefix = True
            elif piece:
                ids += self._prefixing.encode(piece) if prefix and self.legacy else self._unprefixed(piece)
                prefix = False
        if not self.legacy and after is After.nothing and ids[0] == self._lone_space and len(ids) > 1:
            # A prefix with nothing to be the prefix of.
            return ids[1:] if ids[1] in self.specials.values() else ids
        return ids

    def _unprefixed(self, piece: str) -> list[int]:
        if piece[0] not in " ▁":
            return self._plain.encode(piece)
        return self._plain.encode(self._shield + piece)[self._shield_length :]


def _rebuild_sentencepiece(model: bytes, specials: Mapping[str, int], legacy: bool) -> SentencePieceEncoder:
    return SentencePieceEncoder(model, specials, legacy=legacy)


class FastEncoder:
    """A fast tokenizer; where it puts a prefix of its own in front of every text, that is measured and taken off."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, specials: Mapping[str, int], image_token: str) -> None:
        self.specials: Mapping[str, int] = dict(specials)
        self._contexts: dict[str, list[int]] = {"": []}
        self._backend = _blind_to(tokenizer.backend_tokenizer, image_token)
        eos = tokenizer.eos_token
        self._special = eos if eos in self.specials else next(iter(self.specials), "")
        self._anchor = self._find_anchor()

    def encode(self, text: str, after: After) -> list[int]:
        if after is After.nothing:
            return self._ids(text)
        return self._behind(self._special if after is After.special else self._anchor, text)

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _behind(self, context: str, text: str) -> list[int]:
        if context not in self._contexts:
            self._contexts[context] = self._ids(context)
        before, both = self._contexts[context], self._ids(context + text)
        if both[: len(before)] != before:
            raise UserError(
                "the tokenizer merges a text with what stands before it",
                found=f"{context!r} is {before} alone and {both[: len(before)]} before {text[:20]!r}",
                expected="the same ids", remedy="add the tokenizer's tokenizer.model, or choose another language model",
            )  # fmt: skip
        return both[len(before) :]

    def _find_anchor(self) -> str:
        """What a text has to stand behind to be encoded without a prefix: nothing, a special token, or a newline."""
        bare = self._behind("\n", "a")
        return next((context for context in ("", self._special) if self._behind(context, "a") == bare), "\n")


def _blind_to(backend: tokenizers.Tokenizer, token: str) -> tokenizers.Tokenizer:
    """A copy in which the image token's name is ordinary text, so that only placeholders ever become images."""
    # Renamed, not removed: ids of later tokens must stay. The new name is a private-use character.
    name = "\U0010fffd"
    state = json.loads(backend.to_str())
    state["truncation"] = state["padding"] = None
    for added in state["added_tokens"]:
        added["content"] = name if added["content"] == token else added["content"]
    vocabulary = state["model"].get("vocab")
    if isinstance(vocabulary, dict) and token in vocabulary:
        vocabulary[name] = vocabulary.pop(token)
    elif isinstance(vocabulary, list):
        state["model"]["vocab"] = [[name if piece == token else piece, score] for piece, score in vocabulary]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _special_pattern(specials: Mapping[str, int]) -> re.Pattern[str] | None:
    longest_first = sorted(specials, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
