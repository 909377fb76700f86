"""Changes when the tokenizer, the tiny backbones or their training rows change."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM, PreTrainedTokenizerFast

from anchorformer.contracts import IGNORE_INDEX
from miniworld import texts
from miniworld.clip import build_clip, draw_pool, train_clip
from miniworld.config import ClipConfig, LlamaConfig
from miniworld.documents import CITIES, ITEMS, NAMES, SHOPS
from miniworld.llama import answer_loss, build_llama, encode, exact_match, train_llama, training_batches
from miniworld.pictures import COLORS
from miniworld.scenes import SHAPES
from miniworld.tokens import save_tokenizer, train_tokenizer
from miniworld.world import DOMAINS, Split, entry


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer()


def test_every_word_and_number_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    words = [*COLORS, *SHAPES, *SHOPS, *ITEMS, *NAMES, *CITIES, *map(str, range(100))]
    assert [word for word in words if len(tokenizer.tokenize(" " + word)) != 1] == []


@given(text=st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_survives(text: str) -> None:
    tokenizer = _shared()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


_made: list[PreTrainedTokenizerFast] = []


def _shared() -> PreTrainedTokenizerFast:
    # hypothesis does not mix with function arguments of wider scope.
    if not _made:
        _made.append(train_tokenizer())
    return _made[0]


def test_tokenizer_folder_loads_by_auto_and_equals(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<bos><user><image>\nwhat color is the star?<asst> red<eos>"
    assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<bos>", "<eos>", "<pad>")
    # transformers' CLIP pools at the largest id, not at EOS, if EOS happens to be id 2.
    assert loaded.eos_token_id != 2


def test_chat_template_only_grows_and_is_what_the_llama_reads(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("what is the total?", "12"), ("what is the shop?", "nova")]
    messages: list[dict[str, str]] = []
    written = ""
    for index, (question, answer) in enumerate(turns):
        opening = "a receipt.\n" if index == 0 else ""
        messages.append({"role": "user", "content": opening + question})
        asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": answer})
        answered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert asked.startswith(written)
        assert answered.startswith(asked)
        written = answered
    assert written == texts.converse(turns, opening="a receipt.")


def test_chat_template_takes_messages_in_parts(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "what is the total?"}]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert rendered == "<bos><user><image>\nwhat is the total?"


@pytest.mark.parametrize("domain", DOMAINS)
def test_supervised_are_exactly_the_answers_with_their_ends(domain: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for index in range(20):
        item = entry(domain, Split.train, "labels", index)
        answers = [question.answer for question in item.questions()[: texts.MAX_TURNS]]
        rows = [texts.looking_up(item), texts.repeating(item), "<bos>" + "pad " * 80]
        ids, labels = encode(tokenizer, rows, length=200)
        said = [tokenizer.decode(row[row != IGNORE_INDEX]) for row in labels[:2]]
        assert said == ["".join(f" {answer}<eos>" for answer in answers), f" {item.caption}<eos>"]
        assert ((labels == ids) | (labels == IGNORE_INDEX)).all()


def test_plain_captions_are_supervised_in_their_second_half(tokenizer: PreTrainedTokenizerFast) -> None:
    item = entry("doc", Split.train, "labels", 0)
    _, labels = encode(tokenizer, [texts.captioning(item), texts.looking_up(item)], length=200)
    said = tokenizer.decode(labels[0][labels[0] != IGNORE_INDEX])
    # The first token of the repetition cannot be told from the context, and need not be.
    assert (item.caption + "\n").endswith(said)
    assert len(said) >= len(item.caption) - 8


def test_text_stream_is_deterministic_and_holds_no_held_out_content(tokenizer: PreTrainedTokenizerFast) -> None:
    config = LlamaConfig(steps=16, batch=4)
    first, again = training_batches(config, tokenizer), training_batches(config, tokenizer)
    for _ in range(16):
        (a, _), (b, _) = next(first), next(again)
        assert torch.equal(a, b)
    assert {texts.training_item(index, 0).domain for index in range(3)} == set(DOMAINS)
    assert all(":train:" in texts.training_item(index, 0).key for index in range(30))


def test_llama_learns_and_two_runs_agree_to_the_bit(tokenizer: PreTrainedTokenizerFast) -> None:
    config = LlamaConfig(steps=20, batch=6)
    states = []
    for _ in range(2):
        model, loss = train_llama(config, tokenizer)
        states.append(model.state_dict())
    assert loss < 5.5  # ln(vocabulary) is 6.6
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_clip_learns_and_its_tower_loads_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model, loss = train_clip(ClipConfig(steps=30, batch=12, pictures=48), tokenizer)
    assert loss < 2.0  # ln(12) is 2.48
    model.save_pretrained(tmp_path)
    tower = CLIPVisionModel.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        alone = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        inside = model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(alone, inside, atol=1e-5)
    assert alone.shape == (2, 65, 128)


def test_pool_is_a_third_of_each_domain(tokenizer: PreTrainedTokenizerFast) -> None:
    pool = draw_pool(Split.train, "test", 30, tokenizer)
    said = tokenizer.batch_decode(pool.ids_ML, skip_special_tokens=True)
    kinds = {"scene": "a scene:", "doc": ("a form:", "a receipt:"), "chart": ("a bar", "a pie", "a line")}
    assert [sum(text.startswith(start) for text in said) for start in kinds.values()] == [10, 10, 10]
    # Right padded with the end in place: nothing of a caption is cut.
    assert all((row == tokenizer.eos_token_id).sum() == 1 for row in pool.ids_ML)
    assert build_clip(tokenizer).config.text_config.max_position_embeddings == pool.ids_ML.shape[1]


def test_exact_match_counts_whole_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that knows the first word of every answer only must not be credited for answers of two words."""

    class FirstWordOnly(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **_: object) -> object:  # type: ignore[override]
            wanted = torch.full((*input_ids.shape, len(tokenizer)), 0.0)
            ahead = input_ids.roll(-1, 1)
            is_second = input_ids.roll(1, 1) == tokenizer.convert_tokens_to_ids("<asst>")
            ends = ahead == tokenizer.eos_token_id
            ahead = torch.where(is_second & ~ends, torch.zeros_like(ahead), ahead)
            wanted.scatter_(-1, ahead[..., None], 1.0)
            return type("Out", (), {"logits": wanted})()

    result = exact_match(FirstWordOnly(build_llama(tokenizer).config), tokenizer, per_domain=40)
    assert result["scene/color"] == 1.0
    assert result["scene/where"] == 0.0


def test_loss_looks_at_supervised_positions_only(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = build_llama(tokenizer)
    ids, labels = encode(tokenizer, [texts.looking_up(entry("doc", Split.train, "loss", i)) for i in range(4)], 200)
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    assert answer_loss(model, (ids, labels)).item() == pytest.approx(plain.item(), rel=1e-5)


def test_babble_is_said_twice() -> None:
    row = texts.babbling(["a", "b", "c", "d", "e", *map(str, range(30))], random.Random(0))
    first, second = row.removeprefix("<bos><user>").removesuffix("<eos>").split("<asst>")
    assert first == second
    assert len(first.split()) >= 5
