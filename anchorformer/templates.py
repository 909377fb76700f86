"""How a conversation is written down: the order of texts, special tokens and images, and what is supervised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jinja2
from transformers import PreTrainedTokenizerBase

from anchorformer.dialogue import Dialogue, read_turns
from anchorformer.errors import UserError
from anchorformer.template_names import TEMPLATE_NAMES
from anchorformer.tokenization import After

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

CHAT_DATE = "26 Jul 2024"
"""What Llama 3's templates are told the day is (their own default): ids must be the same tomorrow."""


@dataclass(frozen=True, slots=True)
class Text:
    """A stretch of text that is encoded on its own."""

    text: str
    after: After
    supervised: bool = False


@dataclass(frozen=True, slots=True)
class Special:
    """One special token, given by id."""

    id: int
    supervised: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """The place of the next image."""


Segment = Text | Special | Picture


class Template(Protocol):
    """A way of writing a dialogue down."""

    name: str
    stop: str
    """Text of what ends an answer, and is supervised with it."""
    after_image: After
    """What text behind an image is encoded as."""

    def segments(self, dialogue: Dialogue, *, generate: bool) -> list[Segment]:
        """The whole dialogue; with `generate` a last turn without answer is followed by the generation prompt."""
        ...


class PlainTemplate:
    """LLaVA's caption format: images, then the answer and a newline; what the user says is not written at all.

    A tokenizer without BOS (Qwen's) begins with the image.
    """

    name, stop, after_image = "plain", "\n", After.nothing

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.bos_id: int | None = tokenizer.bos_token_id

    def segments(self, dialogue: Dialogue, *, generate: bool) -> list[Segment]:
        segments: list[Segment] = [] if self.bos_id is None else [Special(self.bos_id)]
        after = After.nothing
        for exchange in dialogue.exchanges:
            if exchange.num_images:
                segments += [Picture()] * exchange.num_images
                after = self.after_image
            if exchange.answer is not None:
                segments.append(Text(exchange.answer + self.stop, after, supervised=True))
                after = After.text
        return segments


class V1Template:
    """Vicuna v1 as LLaVA 1.5 writes it; images stand at the front of their turn.

    A conversation that ends with the user keeps that turn, unsupervised, as the published code writes it.

    Raises:
        UserError: the tokenizer has no BOS or no EOS token.
    """

    name, after_image = "v1", After.nothing

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise UserError(
                "template v1 does not fit this tokenizer",
                found=f"bos_token={tokenizer.bos_token}, eos_token={tokenizer.eos_token}", expected="both of them",
                remedy="use template=chat, the tokenizer's own",
            )  # fmt: skip
        self.bos_id: int = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.stop = str(tokenizer.eos_token)

    def segments(self, dialogue: Dialogue, *, generate: bool) -> list[Segment]:
        segments: list[Segment] = [Special(self.bos_id)]
        opening, after = (V1_SYSTEM if dialogue.system is None else dialogue.system) + " ", After.nothing
        for exchange in dialogue.exchanges:
            text = f"{opening}USER: "
            said = exchange.pieces[0]
            if exchange.num_images:
                said = "".join(exchange.pieces).strip()
                for _ in range(exchange.num_images):
                    segments += [Text(text, after), Picture()]
                    text, after = "\n", self.after_image
                text = f"\n{said}" if said else ""
            else:
                text += said
            if exchange.answer is None and not generate:
                segments.append(Text(f"{text} ", after))
                break
            segments.append(Text(f"{text} ASSISTANT:", after))
            if exchange.answer is not None:
                answer = f" {exchange.answer}" if exchange.answer else ""
                segments += [Text(answer, After.text, supervised=True), Special(self.eos_id, supervised=True)]
            opening, after = "", After.special
        return segments


class ChatTemplate:
    """The tokenizer's own Jinja template; images stay where they stand, answers are found by rendering prefixes.

    Supervised is what the template writes for an answer, up to and with its first special token (all of it where there
    is none). BOS stands where the template writes it.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    name, after_image = "chat", After.special

    def __init__(self, tokenizer: PreTrainedTokenizerBase, specials: Sequence[str]) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "template chat does not fit this tokenizer", found="a tokenizer without a chat template",
                expected="chat_template in tokenizer_config.json, or chat_template.jinja beside it",
                remedy="use template=v1 (Vicuna) or plain (captions), or an instruction-tuned language model",
            )  # fmt: skip
        self._tokenizer, self._specials = tokenizer, tuple(specials)
        self.stop = self._probe()

    def segments(self, dialogue: Dialogue, *, generate: bool) -> list[Segment]:
        mark = _unused_character(dialogue)
        messages = [] if dialogue.system is None else [{"role": "system", "content": dialogue.system}]
        segments: list[Segment] = []
        written, after = "", After.nothing
        for exchange in dialogue.exchanges:
            messages.append({"role": "user", "content": mark.join(exchange.pieces)})
            if exchange.answer is None and not generate:
                break
            asked = self._render(messages, prompt=True)
            segments += self._pictured(self._new(asked, written), after, mark)
            written, after = asked, self._after(asked)
            if exchange.answer is None:
                return segments
            messages.append({"role": "assistant", "content": exchange.answer})
            answered = self._render(messages, prompt=False)
            said, rest = self._split_answer(self._new(answered, written), exchange.answer)
            segments.append(Text(said, after, supervised=True))
            # What follows the stop (often a newline) is encoded with the next turn, if there is one.
            written, after = answered.removesuffix(rest) if rest else answered, self._after(said)
        if dialogue.exchanges[-1].answer is not None:
            # The last stop ends the sample: what the template writes behind it is never read.
            return segments
        return segments + self._pictured(self._new(self._render(messages, prompt=False), written), after, mark)

    def _render(self, messages: Sequence[dict[str, str]], *, prompt: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=prompt, date_string=CHAT_DATE
                )
            )
        except jinja2.TemplateError as error:
            raise UserError(
                "the chat template refuses a conversation", found=f"{error} ({', '.join(m['role'] for m in messages)})",
                expected="a conversation that this template can write",
                remedy="leave the record out, or use template=v1",
            ) from None  # fmt: skip

    def _new(self, longer: str, shorter: str) -> str:
        if not longer.startswith(shorter):
            at = next((i for i, (a, b) in enumerate(zip(longer, shorter, strict=False)) if a != b), len(longer))
            raise UserError(
                "the chat template rewrites earlier turns when later ones come, so labels cannot be placed",
                found=f"{longer[at : at + 40]!r} where {shorter[at : at + 40]!r} stood",
                expected="a template whose text only grows",
                remedy="use template=v1, or give the tokenizer another one",
            )  # fmt: skip
        return longer[len(shorter) :]

    def _split_answer(self, text: str, answer: str) -> tuple[str, str]:
        """What is supervised of the text that an answer added, and the rest. Templates may strip the answer."""
        at = text.find(answer) if answer and answer in text else text.find(answer.strip())
        said = answer if answer and answer in text else answer.strip()
        if at < 0 or text[:at].strip():
            raise UserError(
                "the chat template does not write an answer directly after the generation prompt",
                found=repr(text[:60]), expected=f"{answer[:40]!r} first",
                remedy="use template=v1, or give the tokenizer a template that knows add_generation_prompt",
            )  # fmt: skip
        tail = text[at + len(said) :]
        ends = [tail.index(token) + len(token) for token in self._specials if token in tail]
        if not tail:
            raise UserError(
                "the chat template does not end an answer", found=repr(text[-40:]), expected="a stop after the answer",
                remedy="give the tokenizer a template that writes its EOS token after each answer",
            )  # fmt: skip
        end = at + len(said) + (min(ends) if ends else len(tail))
        return text[:end], text[end:]

    def _pictured(self, text: str, after: After, mark: str) -> list[Segment]:
        segments: list[Segment] = []
        for index, piece in enumerate(text.split(mark)):
            if index:
                segments.append(Picture())
                after = self.after_image
            if piece:
                segments.append(Text(piece, after))
        return segments

    def _after(self, text: str) -> After:
        return After.special if text.endswith(self._specials) else After.text

    def _probe(self) -> str:
        """Writes a small conversation, so that a template that cannot be used is refused before any data is read."""
        turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        segments = self.segments(read_turns(turns, 0, "probe"), generate=False)
        answers = [segment.text for segment in segments if isinstance(segment, Text) and segment.supervised]
        return answers[-1].lstrip().removeprefix("d")


def _unused_character(dialogue: Dialogue) -> str:
    """A private-use character that no text of this dialogue holds, to find the images again after rendering."""
    text = "".join(piece for exchange in dialogue.exchanges for piece in (*exchange.pieces, exchange.answer or ""))
    return next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)


def make_template(name: str, tokenizer: PreTrainedTokenizerBase, specials: Sequence[str]) -> Template:
    """The template called `plain`, `v1` or `chat`.

    Raises:
        UserError: no such template, or the tokenizer lacks what it needs.
    """
    match name:
        case "plain":
            return PlainTemplate(tokenizer)
        case "v1":
            return V1Template(tokenizer)
        case "chat":
            return ChatTemplate(tokenizer, specials)
    raise UserError(
        "no such conversation template", found=name, expected=f"one of {', '.join(TEMPLATE_NAMES)}",
        remedy="set stage.template",
    )  # fmt: skip
