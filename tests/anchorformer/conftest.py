"""Tiny tokenizers of the two families that language models come with, for the tests of text."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SAID = [
    "USER: What colour is the small square next to the circle? ASSISTANT: It is red, I think.",
    "A chart with 3 bars: 12, 7 and 40 percent.", "the total is 7.50; the name of the shop is café über 42",
    "line one\nline two\n\n  indented line, (brackets) <tags> and $signs & so on!",
    "A chat between a curious user and an artificial intelligence assistant.",
]  # fmt: skip

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token + '\\n' }}"
    "{% else %}{{ '<|' + m.role + '|>' + m.content + '\\n' }}{% if m.role == 'user' and (not loop.last or "
    "add_generation_prompt) %}{{ '<|assistant|>\\n' }}{% endif %}{% endif %}{% endfor %}"
)
"""Roles as special tokens, a newline after the stop that belongs to no answer."""

TokenizerMaker = Callable[..., Any]


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerMaker:
    """`make_tokenizer("bytes")`, `"bytes_with_image"` (in its vocabulary from the start), `"legacy_true"` or
    `"legacy_false"`; keywords replace the tokenizer's own."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    roles = ["<|user|>", "<|assistant|>", "<|system|>"]
    byte_level = {
        "bytes": _train_byte_level(["<pad>", "<s>", "</s>", *roles]),
        "bytes_with_image": _train_byte_level(["<pad>", "<s>", "<image>", "</s>", *roles]),
    }
    sentencepiece_model = _train_sentencepiece()

    def make(family: str, **changes: Any) -> Any:
        values: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE, **changes}
        if family in byte_level:
            return PreTrainedTokenizerFast(tokenizer_object=byte_level[family], pad_token="<pad>", **values)
        folder = tmp_path_factory.mktemp(family)
        (folder / "tokenizer.model").write_bytes(sentencepiece_model)
        config = {
            "tokenizer_class": "LlamaTokenizer", "legacy": family == "legacy_true", "unk_token": "<unk>",
            "add_bos_token": True, "clean_up_tokenization_spaces": False, **values,
        }  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(roles, special_tokens=True)
        return tokenizer

    return make


@pytest.fixture(scope="session")
def sentencepiece_folder(make_tokenizer: TokenizerMaker) -> Path:
    """A folder with tokenizer.model and tokenizer_config.json, `legacy: false`; tests must not write into it."""
    return Path(make_tokenizer("legacy_false").vocab_file).parent


def _train_byte_level(specials: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SAID, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    )
    return bpe


@pytest.fixture(scope="session")
def stripping_sentencepiece() -> bytes:
    """A model whose normaliser removes leading spaces, unlike Llama's."""
    return _train_sentencepiece(remove_extra_whitespaces=True)


def _train_sentencepiece(*, remove_extra_whitespaces: bool = False) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAID * 3), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=remove_extra_whitespaces,
        allow_whitespace_only_pieces=True, split_digits=True, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()
