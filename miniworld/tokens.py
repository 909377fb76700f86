"""The tiny Llama's tokenizer: byte-level BPE in which every word and number of the world is one token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from miniworld.texts import DESCRIBE
from miniworld.world import DOMAINS, Split, entry

PAD, BOS, USER, EOS, ASSISTANT, IMAGE = SPECIALS = ("<pad>", "<bos>", "<user>", "<eos>", "<asst>", "<image>")
"""In order of their ids. EOS must not be id 2, which transformers' CLIP reads as "pool at the largest id"."""

VOCABULARY = 1024

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}{% else %}"
    "{% set parts = namespace(text='') %}{% for part in message['content'] %}"
    "{% set parts.text = parts.text + ('<image>\\n' if part['type'] == 'image' else part['text']) %}{% endfor %}"
    "{% set text = parts.text %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<asst> ' + text + eos_token }}"
    "{% elif message['role'] == 'user' %}{{ '<user>' + text }}"
    "{% else %}{{ text + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<asst>' }}{% endif %}"
)
"""`<bos><user>question<asst> answer<eos>...`: each rendering is a prefix of the longer one, and an answer carries the
blank that makes its words the same tokens as in a caption."""


def train_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer; a pure function of the world."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[USER, ASSISTANT, IMAGE],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)


def _texts() -> Iterator[str]:
    # Frequent enough that no number stays split, however rare it is in the world.
    yield from [" " + " ".join(str(number) for number in range(100))] * 50
    yield from [DESCRIBE] * 50
    for index in range(2000):
        for domain in DOMAINS:
            item = entry(domain, Split.train, "tokens", index)
            yield item.caption
            for question in item.questions():
                yield question.text
                yield " " + question.answer
