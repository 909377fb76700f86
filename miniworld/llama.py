"""The tiny language model: a Llama that reads the world in words, and the check that it learned to look things up."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig as HfLlamaConfig
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from anchorformer.contracts import IGNORE_INDEX
from miniworld import texts
from miniworld.config import LlamaConfig
from miniworld.loop import computes_bf16, fit
from miniworld.pictures import Question
from miniworld.tokens import ASSISTANT
from miniworld.world import DOMAINS, Entry, Split, entry

GATED = ("doc/name", "doc/city", "doc/date", "doc/id", "doc/shop")
"""Templates that a model which has learned to look things up answers from text almost always."""

_POOL = 8
"""Batches that are sorted by length together, so that rows of one batch are about equally long."""


def build_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    shape = HfLlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        # Tied embeddings and a wide start let copying form early: a word that is attended to is a word that is said.
        tie_word_embeddings=True,
        initializer_range=0.08,
        # With biases a head can look at a distance whatever the words are, which lookups begin with.
        attention_bias=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Written-out attention is several times faster than the fused one at this size on a CPU.
    shape._attn_implementation = "eager"
    return LlamaForCausalLM(shape)


def train_llama(config: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, float]:
    """The model and its final training loss."""
    torch.manual_seed(config.seed)
    model = build_llama(tokenizer)
    batches = training_batches(config, tokenizer)
    loss = fit(
        model, batches, answer_loss, steps=config.steps, lr=config.lr, weight_decay=0.01, name="tiny llama", position=1
    )
    return model, loss


def training_batches(config: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of ids and labels, (batch, length) int64, without end."""
    rng = random.Random(f"{config.seed}:llama")
    words = sorted(word for word in tokenizer.get_vocab() if word.startswith("Ġ") and len(word) > 2)
    words = [word[1:] for word in words]
    drawn = step = 0
    while True:
        rows = []
        for _ in range(_POOL * config.batch):
            rows.append(_row(texts.training_item(drawn, config.seed), step / config.steps, words, rng))
            drawn += 1
        rows.sort(key=len)
        starts = range(0, len(rows), config.batch)
        pool = [encode(tokenizer, rows[at : at + config.batch], config.length) for at in starts]
        rng.shuffle(pool)
        yield from pool
        step += _POOL


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels; supervised are the answers with their end, and a `plain` caption's second half."""
    ids = tokenizer(
        rows, add_special_tokens=False, padding=True, truncation=True, max_length=length, return_tensors="pt"
    )["input_ids"]
    opened = (ids == tokenizer.convert_tokens_to_ids(ASSISTANT)).cumsum(1)
    closed = (ids == tokenizer.eos_token_id).cumsum(1)
    # An answer lies between its opening token, not supervised, and its end, supervised.
    end = ids == tokenizer.eos_token_id
    answered = (opened > closed) | end
    answered &= ids != tokenizer.convert_tokens_to_ids(ASSISTANT)
    plain = opened[:, -1:] == 0
    lengths = (ids != tokenizer.pad_token_id).sum(1, keepdim=True)
    at = torch.arange(ids.shape[1])
    second_half = plain & (at > lengths // 2) & (at < lengths)
    return ids, ids.masked_fill(~(answered | second_half), IGNORE_INDEX)


def answer_loss(model: LlamaForCausalLM, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy of the supervised tokens; the vocabulary projection runs at their positions only."""
    ids, labels = batch
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    return F.cross_entropy(model.lm_head(hidden[supervised]).float(), targets[supervised])


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, per_domain: int = 200) -> dict[str, float]:
    """Share of questions answered exactly from the caption, per template, on held-out contents.

    All answer tokens and the end must be the most likely ones given the right answer so far, which equals exact match
    of greedy decoding.
    """
    asked: list[tuple[str, Question]] = []
    for domain in DOMAINS:
        for index in range(per_domain):
            item = entry(domain, Split.val, "text-eval", index)
            asked += [(item.caption, question) for question in item.questions()[:3]]
    right: dict[str, list[bool]] = defaultdict(list)
    for at in range(0, len(asked), 200):
        part = asked[at : at + 200]
        rows = [texts.converse([(question.text, question.answer)], opening=caption) for caption, question in part]
        ids, labels = encode(tokenizer, rows, length=512)
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bf16()):
            guesses = model(input_ids=ids).logits[:, :-1].argmax(-1)
        targets = labels[:, 1:]
        hits = ((guesses == targets) | (targets == IGNORE_INDEX)).all(1).tolist()
        for (_, question), hit in zip(part, hits, strict=True):
            right[question.template].append(hit)
    return {template: sum(hits) / len(hits) for template, hits in sorted(right.items())}


def _row(item: Entry, done: float, words: list[str], rng: random.Random) -> str:
    """One row; `done` is the share of the steps behind us. Copying is practised first, looking up afterwards."""
    early = done < 0.2
    babble, repeat, caption, look_up = (0.4, 0.1, 0.1, 0.4) if early else (0.15, 0.05, 0.1, 0.7)
    kind = rng.choices(("babble", "repeat", "caption", "look up"), (babble, repeat, caption, look_up))[0]
    if kind == "babble":
        return texts.babbling(words, rng)
    return {"repeat": texts.repeating, "caption": texts.captioning, "look up": texts.looking_up}[kind](item)
