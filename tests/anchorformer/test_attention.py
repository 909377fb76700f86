"""The attention seam against plain softmax, and language models run flat, padded and with a cache through it."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from anchorformer.errors import UserError
from anchorformer.kernels import backend as backend_module
from anchorformer.kernels.attention import FLAT_MASK, TEXT_ATTENTION, attend, attend_flat
from anchorformer.kernels.backend import Backend, choose

BACKENDS = [Backend.matmul, Backend.sdpa]
# fp32 logits of three tiny layers: packed and separate differ by the order of sums only; the bound is 1e-5.
LOGIT_TOLERANCE = 1e-5


def _plain(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in float64, key heads repeated; returns (B, S, H, K)."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _qkv(batch: int, heads: int, key_heads: int, queries: int, keys: int, width: int = 8) -> list[Tensor]:
    shapes = ((batch, heads, queries, width), (batch, key_heads, keys, width), (batch, key_heads, keys, width))
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def _allowed_flat(lengths: list[int]) -> Tensor:
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    total = sum(lengths)
    return (sample[:, None] == sample[None]) & torch.ones(total, total, dtype=torch.bool).tril()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["full", "causal", "mask"])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
def test_backends_equal_plain_softmax_and_its_gradients(
    backend: Backend, kind: str, heads: int, key_heads: int
) -> None:
    torch.manual_seed(0)
    queries, keys = (7, 7) if kind == "causal" else (5, 7)
    query, key, value = _qkv(2, heads, key_heads, queries, keys)
    mask = torch.rand(2, 1, queries, keys) > 0.4
    mask[..., 0] = True
    allowed = {"full": None, "causal": torch.ones(7, 7, dtype=torch.bool).tril(), "mask": mask}[kind]

    expected = _plain(query, key, value, allowed)
    weights = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    found = attend(
        query,
        key,
        value,
        scale=8**-0.5,
        causal=kind == "causal",
        mask=mask if kind == "mask" else None,
        backend=backend,
    )
    found_grads = torch.autograd.grad((found * weights).sum(), (query, key, value))

    assert found.is_contiguous()
    # fp32 against float64 with values of order one: 1e-5 is about a hundred roundings.
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_error_is_at_most_twice_that_of_the_plain_computation(backend: Backend) -> None:
    """The yardstick of flash-attention's tests: plain attention in bf16 against fp32."""
    torch.manual_seed(1)
    query, key, value = (x.detach() for x in _qkv(2, 4, 2, 33, 33, 16))
    allowed = torch.ones(33, 33, dtype=torch.bool).tril()
    exact = _plain(query, key, value, allowed)
    halves = [x.bfloat16() for x in (query, key, value)]
    scores = halves[0] @ halves[1].repeat_interleave(2, 1).transpose(-1, -2) / 4
    plain_half = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ halves[2].repeat_interleave(2, 1)
    yardstick = (plain_half.transpose(1, 2).double() - exact).abs().max()
    found = attend(*halves, scale=0.25, causal=True, backend=backend)
    assert (found.double() - exact).abs().max() <= 2 * yardstick


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), half=st.booleans(), groups=st.sampled_from([1, 2]))
def test_flat_attention_is_causal_attention_inside_each_sample(lengths: list[int], half: bool, groups: int) -> None:
    torch.manual_seed(sum(lengths))
    query, key, value = _qkv(1, 2 * groups, 2, sum(lengths), sum(lengths))
    expected = _plain(query, key, value, _allowed_flat(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    dtype = torch.bfloat16 if half else torch.float32
    found = attend_flat(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        scale=8**-0.5,
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
    )
    tolerance = 5e-2 if half else 1e-5  # bf16 keeps 8 bits: values up to ~3 are rounded by up to 1e-2, several times
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 9), more_keys=st.integers(0, 4), groups=st.sampled_from([1, 2]), causal=st.booleans(),
    room=st.integers(1, 400),
)  # fmt: skip
def test_without_backward_scores_are_computed_block_by_block(
    queries: int, more_keys: int, groups: int, causal: bool, room: int
) -> None:
    """Whatever the room for scores, heads and rows are the ones of the whole product; fp32 sums of 13 terms at most."""
    torch.manual_seed(queries)
    query, key, value = (x.float() for x in _qkv(2, 2 * groups, 2, queries, queries + more_keys))
    how: dict[str, Any] = {"scale": 8**-0.5, "causal": causal, "backend": Backend.matmul}
    whole = attend(query.requires_grad_(), key, value, **how)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("anchorformer.kernels.attention.SCORES_AT_A_TIME", room)
        patch.setattr("anchorformer.kernels.attention._matmul", None)  # is not what runs
        found = attend(query, key, value, **how)
    torch.testing.assert_close(found, whole.detach(), atol=1e-6, rtol=1e-6)


def test_choice_is_a_function_of_device_dtype_and_size(caplog: pytest.LogCaptureFixture) -> None:
    cpu = torch.device("cpu")
    backend_module._log_once.cache_clear()
    limit = backend_module.LARGEST_MATMUL_POSITIONS[torch.bfloat16]
    with caplog.at_level(logging.INFO, logger=backend_module.__name__):
        for _ in range(3):
            assert choose(cpu, torch.bfloat16, limit, 64, flat=False, in_blocks=False) is Backend.matmul
            assert choose(cpu, torch.bfloat16, limit + 1, 64, flat=True, in_blocks=False) is Backend.sdpa
            assert choose(cpu, torch.bfloat16, limit + 1, 64, flat=True, in_blocks=True) is Backend.matmul
            assert choose(cpu, torch.float32, 1, 64, flat=True, in_blocks=True) is Backend.sdpa
    assert len(caplog.records) == 4  # each choice once, with its reason
    assert all("(" in record.getMessage() for record in caplog.records)


# --- language models -------------------------------------------------------------------------------------------------

LENGTHS = [5, 11, 3]


def _language_model(family: str, **changes: Any) -> PreTrainedModel:
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        **changes,
    }
    torch.manual_seed(2)
    model: PreTrainedModel
    if family == "llama":
        config = LlamaConfig(**sizes, num_key_value_heads=4)
        model = LlamaForCausalLM._from_config(config, attn_implementation=TEXT_ATTENTION)
    else:
        config = Qwen2Config(**sizes, num_key_value_heads=2)
        model = Qwen2ForCausalLM._from_config(config, attn_implementation=TEXT_ATTENTION)
    return model.eval()


def _ids(lengths: list[int] = LENGTHS) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randint(1, 61, (length,)) for length in lengths]


def _flat(model: PreTrainedModel, samples: list[Tensor]) -> Tensor:
    """Flat logits (S, vocab), the way the multimodal model calls its language model."""
    lengths = [len(sample) for sample in samples]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    embeds = model.get_input_embeddings()(torch.cat(samples)[None])
    return model(
        inputs_embeds=embeds,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        attention_mask=FLAT_MASK,
        use_cache=False,
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
    ).logits[0]


def _padded(samples: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    longest = max(len(sample) for sample in samples)
    ids, mask = torch.zeros(len(samples), longest).long(), torch.zeros(len(samples), longest).long()
    for row, sample in enumerate(samples):
        place = slice(longest - len(sample), None) if side == "left" else slice(0, len(sample))
        ids[row, place], mask[row, place] = sample, 1
    return ids, mask


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_packed_logits_equal_separate_and_stock_logits(family: str) -> None:
    model, samples = _language_model(family), _ids()
    packed = _flat(model, samples).split(LENGTHS)
    stock = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    stock.load_state_dict(model.state_dict())
    assert stock.config._attn_implementation == "eager"
    for logits, sample in zip(packed, samples, strict=True):
        torch.testing.assert_close(logits, _flat(model, [sample]), atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE)
        torch.testing.assert_close(
            logits, stock(sample[None], use_cache=False).logits[0], atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE
        )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_a_sample_does_not_see_its_neighbours(family: str) -> None:
    model, samples = _language_model(family), _ids()
    before = _flat(model, samples).split(LENGTHS)
    changed = [samples[0], (samples[1] + 7) % 61, samples[2]]
    after = _flat(model, changed).split(LENGTHS)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert (before[1] - after[1]).abs().max() > 0.1
    # Without borders the neighbours would be seen: this test can fail.
    joined = model(torch.cat(samples)[None], use_cache=False).logits[0].split(LENGTHS)
    assert (joined[2] - before[2]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_samples_told_apart_by_their_positions_alone_stay_apart(family: str) -> None:
    """Hugging Face's own packed layout, without a mask and without borders."""
    model, samples = _language_model(family), _ids()
    position_ids = torch.cat([torch.arange(len(sample)) for sample in samples])[None]
    logits = model(torch.cat(samples)[None], position_ids=position_ids, use_cache=False).logits[0]
    torch.testing.assert_close(logits, _flat(model, samples), atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_flat_equals_padded(family: str, side: str) -> None:
    model, samples = _language_model(family), _ids()
    ids, mask = _padded(samples, side)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    padded = torch.cat([row[kept.bool()] for row, kept in zip(logits, mask, strict=True)])
    torch.testing.assert_close(padded, _flat(model, samples), atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generation_with_a_cache_equals_generation_without(family: str, cache: str) -> None:
    model, samples = _language_model(family), _ids()
    ids, mask = _padded(samples, "left")
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    without = model.generate(ids, use_cache=False, **options)
    chosen = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    assert torch.equal(model.generate(ids, use_cache=True, **chosen, **options), without)
    alone = model.generate(samples[1][None], use_cache=True, **{**options, "attention_mask": None})
    assert torch.equal(alone[0], without[1])


@torch.no_grad()
def test_a_prompt_continued_in_chunks_equals_the_whole_prompt() -> None:
    """More keys than queries: the causal rule counts from the end of the keys."""
    model, sample = _language_model("llama"), _ids([12])[0]
    whole = model(sample[None], use_cache=False).logits
    first = model(sample[None, :7], use_cache=True)
    rest = model(sample[None, 7:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(
        torch.cat([first.logits, rest.logits], 1), whole, atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gradient_checkpointing_leaves_gradients_alone(family: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = _language_model(family).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        _flat(model, _ids()).float().logsumexp(-1).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_autocast_runs_queries_keys_and_values_in_one_dtype() -> None:
    model, samples = _language_model("qwen2"), _ids()
    exact = _flat(model, samples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = _flat(model, samples)
    assert rounded.dtype is torch.bfloat16
    # Three layers in bf16 (8 bits): a few per cent of the largest logit.
    assert (rounded.float() - exact).abs().max() < 0.08 * exact.abs().max()


def test_flat_form_refuses_what_only_fits_the_padded_form() -> None:
    model, samples = _language_model("llama"), _ids()
    cu_seqlens = torch.tensor([0, 19], dtype=torch.int32)
    ids = torch.cat(samples)[None]
    flat = {"cu_seq_lens_q": cu_seqlens, "max_length_q": 19, "use_cache": False}
    mask = torch.ones(1, 19).long()
    mask[0, 0] = 0
    with pytest.raises(UserError, match="padded form"):
        model(ids, attention_mask=mask, **flat)
    with pytest.raises(UserError, match="padded form"):
        model(ids.expand(2, -1), **flat)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(UserError, match="padded form"):
        model(ids[:, :2], past_key_values=cache, cu_seq_lens_q=cu_seqlens, max_length_q=2, use_cache=True)


def test_sliding_windows_are_kept_in_the_padded_form_and_refused_in_the_flat_one() -> None:
    changes = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    model, samples = _language_model("qwen2", **changes), _ids()
    with pytest.raises(UserError, match="padded form"):
        _flat(model, samples)
    ids = samples[1][None]
    stock = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, use_cache=False).logits,
            stock(ids, use_cache=False).logits,
            atol=LOGIT_TOLERANCE,
            rtol=LOGIT_TOLERANCE,
        )


def test_rules_of_other_language_models_are_refused() -> None:
    model = _language_model("llama")
    with pytest.raises(UserError, match="softcap"):
        model(_ids()[0][None], softcap=30.0, use_cache=False)
