"""The Triton kernels against the published rule and plain arithmetic.

Marked `gpu`: `make test-gpu` runs them on the card. test_triton.py runs the same tests on the CPU, interpreted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig

from anchorformer.contracts import VisionFeatures, VisionNeeds
from anchorformer.errors import UserError
from anchorformer.kernels import backend, cls_row, selection, vision_attention
from anchorformer.kernels.attention import attend
from anchorformer.kernels.backend import Backend
from anchorformer.selectors.anchor import AnchorSelectorConfig
from anchorformer.vision import VisionTower

pytestmark = pytest.mark.gpu

INTERPRETED = backend.triton_is_interpreted()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
on_the_card = pytest.mark.skipif(INTERPRETED, reason="says nothing in the interpreter")


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    backend.use("triton")
    torch.manual_seed(0)
    yield
    backend.use("auto")


# --- selection -------------------------------------------------------------------------------------------------------


def _published(scores_BHN: Tensor, num_anchors: int) -> list[list[int]]:
    """The rule word by word, with the stable sort that the released code lacks."""
    per_head = (num_anchors - 1) // scores_BHN.shape[1]
    rankings = scores_BHN[..., 1:].float().cpu().argsort(dim=-1, descending=True, stable=True) + 1
    result = []
    for heads in rankings.tolist():
        chosen = {0}
        for ranking in heads:
            chosen.update([token for token in ranking if token not in chosen][:per_head])
        result.append(sorted(chosen))
    return result


def _scores(kind: str, batch: int, heads: int, tokens: int) -> Tensor:
    scores = torch.randn(batch, heads, tokens)
    if kind == "ties":
        scores = scores.round()
    elif kind == "all equal":
        scores = torch.zeros_like(scores)
    elif kind == "signed zeros":
        scores = torch.where(scores > 0, 0.0, -0.0)
    elif kind == "bf16":
        scores = scores.bfloat16()
    elif kind == "fp16":
        scores = scores.half()
    elif kind == "agreeing heads":
        scores = scores[:, :1].expand(-1, heads, -1)
    elif kind == "infinite":
        scores = torch.where(scores > 1, torch.inf, torch.where(scores < -1, -torch.inf, scores))
    elif kind == "tiny":
        scores = scores * 1e-40  # subnormal
    elif kind == "strided":
        scores = torch.randn(batch, tokens, heads).transpose(1, 2)
    elif kind == "probabilities":
        scores = (scores * 3).softmax(-1)
    return scores.to(DEVICE)


KINDS = [
    "distinct", "ties", "all equal", "signed zeros", "bf16", "fp16", "agreeing heads", "infinite", "tiny", "strided",
    "probabilities",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_are_those_of_the_published_rule(kind: str) -> None:
    scores = _scores(kind, 2, 4, 50)
    assert selection.select_anchors(scores, 17).tolist() == _published(scores, 17)


@pytest.mark.parametrize("kind", ["distinct", "ties"])
@pytest.mark.parametrize(("heads", "tokens", "num_anchors"), [(3, 50, 50), (5, 70, 64), (1, 65, 10), (2, 64, 3)])
def test_every_quota_is_met(kind: str, heads: int, tokens: int, num_anchors: int) -> None:
    """Among them every patch taken (50 of 50), and 5 heads that do not divide 63."""
    scores = _scores(kind, 1, heads, tokens)
    found = selection.select_anchors(scores, num_anchors)
    assert found.dtype is torch.int64
    assert found.tolist() == _published(scores, num_anchors)


LARGE_IMAGES = [(577, 145, "distinct"), (577, 145, "ties"), (2305, 257, "bf16"), (5185, 65, "agreeing heads")]
MORE_LARGE_IMAGES = [(tokens, 145, kind) for tokens in (577, 1025, 2305, 5185) for kind in KINDS]


@pytest.mark.parametrize(("tokens", "num_anchors", "kind"), LARGE_IMAGES + ([] if INTERPRETED else MORE_LARGE_IMAGES))
def test_anchors_of_large_images_are_those_of_the_published_rule(tokens: int, num_anchors: int, kind: str) -> None:
    scores = _scores(kind, 1 if INTERPRETED else 5, 16, tokens)
    assert selection.select_anchors(scores, num_anchors).tolist() == _published(scores, num_anchors)


def test_anchors_are_those_of_the_released_code(golden_root: Path) -> None:
    tensors = load_file(golden_root / "selection/selection.safetensors")
    for case in json.loads((golden_root / "selection/cases.json").read_text()):
        if case["count"] < case["H"]:
            continue  # the released code then returns every token; the selector's config refuses it
        images = slice(0, 1 if INTERPRETED else None)  # the interpreter takes a second for one
        scores = tensors[f"{case['case']}.attn"][images].to(DEVICE)
        row = scores[:, :, 0] if case["full_matrix"] else scores
        found = selection.select_anchors(row, case["count"] + 1)
        assert torch.equal(found.cpu(), tensors[f"{case['case']}.indices"][images]), case["case"]


def test_more_anchors_than_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="4 heads"):
        selection.select_anchors(_scores("distinct", 1, 4, 16), 17)


# --- [CLS] row and attention -----------------------------------------------------------------------------------------


def _qkv(batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as one projection leaves them: strided, and none of them a tensor of its own."""
    query, key, value = (torch.randn(batch, tokens, 3, heads, width) * 1.5).to(DEVICE, dtype).unbind(2)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "tokens", "width"), [(3, 50, 8), (2, 577, 64), (1, 145, 80), (1, 129, 128)])
def test_row_is_as_exact_as_fp32(heads: int, tokens: int, width: int, dtype: torch.dtype) -> None:
    query, key, _ = _qkv(2, heads, tokens, width, dtype)
    scale = width**-0.5
    exact = (query[:, :, :1].double() * key.double()).sum(-1) * scale
    found = cls_row.cls_row(query, key, scale)
    assert found.dtype is torch.float32
    assert found.shape == exact.shape
    # Products of half precision are exact in fp32, so only sums round: the twin rounds as often, in another order.
    assert _error(found, exact) <= 2 * _error(cls_row._plain(query, key, scale), exact) + 1e-7


# The interpreter multiplies bf16 matrices as if they were integers; fp16 takes the same way through the kernel.
HALF = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
SHAPES = [(3, 50, 8), (2, 65, 64), (1, 129, 64), (2, 150, 24)]
LARGE = [] if INTERPRETED else [(2, 257, 48), (2, 577, 64), (1, 1000, 64), (1, 2305, 64), (1, 5185, 64)]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("heads", "tokens", "width"), SHAPES + LARGE)
def test_attention_error_is_at_most_twice_that_of_the_plain_twin(
    heads: int, tokens: int, width: int, dtype: torch.dtype
) -> None:
    """The yardstick of flash-attention's tests: the plain computation in the same precision, against float64."""
    query, key, value = _qkv(2, heads, tokens, width, dtype)
    scale = width**-0.5
    scores = query.double() @ key.double().transpose(-1, -2) * scale
    exact = (scores.softmax(-1) @ value.double()).transpose(1, 2)
    out, row = vision_attention.attend_with_cls_row(query, key, value, scale)
    plain = attend(query, key, value, scale=scale, backend=Backend.matmul)
    assert out.dtype is dtype
    assert out.shape == exact.shape
    assert out.is_contiguous()
    assert _error(out, exact) <= 2 * _error(plain, exact)
    assert torch.equal(row, cls_row.cls_row(query, key, scale))


def test_large_logits_neither_overflow_nor_vanish() -> None:
    query, key, value = _qkv(1, 2, 66, 16, torch.float16)
    query[:, :, ::3] *= 500
    out, _ = vision_attention.attend_with_cls_row(query, key, value, 0.25)
    exact = ((query.double() @ key.double().transpose(-1, -2) * 0.25).softmax(-1) @ value.double()).transpose(1, 2)
    # Logits of 1e3 and more are summed in fp32; weights and values of order one are rounded to fp16, at 5e-4 each.
    torch.testing.assert_close(out.double(), exact, atol=1e-2, rtol=0)


def test_an_image_does_not_depend_on_its_batch() -> None:
    query, key, value = _qkv(3, 2, 65, 64, torch.float16)
    out, row = vision_attention.attend_with_cls_row(query, key, value, 0.125)
    alone = vision_attention.attend_with_cls_row(query[1:2], key[1:2], value[1:2], 0.125)
    assert torch.equal(out[1:2], alone[0])
    assert torch.equal(row[1:2], alone[1])
    assert torch.equal(cls_row.cls_row(query, key, 0.125)[1:2], cls_row.cls_row(query[1:2], key[1:2], 0.125))


# --- the operations in a tower ---------------------------------------------------------------------------------------


def _tower(dtype: torch.dtype = torch.float16) -> VisionTower:
    config = CLIPVisionConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14, intermediate_size=64
    )
    return VisionTower.from_config(config, VisionNeeds(layer=-2, cls_scores=True)).to(DEVICE, dtype)


def _pixels() -> Tensor:
    return torch.randn(2, 3, 56, 56, device=DEVICE)


def test_operations_are_well_formed() -> None:
    """torch's own checks: the schema holds, no input is written to or handed back, fake outputs are like real ones."""
    query, key, value = _qkv(2, 2, 50, 16, torch.float16)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(selection._fused, (torch.randn(2, 4, 50, device=DEVICE), 17), test_utils=checks)
    torch.library.opcheck(cls_row._fused, (query, key, 0.25), test_utils=checks)
    torch.library.opcheck(vision_attention._fused, (query, key, value, 0.25), test_utils=checks)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=on_the_card)])
def test_tower_and_selector_compile_as_one_graph(compiler: str) -> None:
    tower, selector = _tower().requires_grad_(False), AnchorSelectorConfig(num_anchors=9).build(17, 4, True)
    pixels = _pixels()

    def run(pixels: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        features: VisionFeatures = tower(pixels)
        return features.tokens_BNV, features.cls_scores_BHN, selector(features).indices_BT

    tokens, scores, indices = torch.compile(run, fullgraph=True, backend=compiler)(pixels)
    expected = run(pixels)
    # Three layers in fp16 (11 bits), which the compiler may round in other places.
    torch.testing.assert_close(tokens, expected[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(scores, expected[1], atol=2e-2, rtol=2e-2)
    assert scores is not None
    assert torch.equal(indices, selection.select_anchors(scores, 9))


def test_a_tower_gives_what_it_gives_on_the_plain_twins() -> None:
    tower, pixels = _tower().requires_grad_(False), _pixels()
    fused: VisionFeatures = tower(pixels)
    backend.use("torch")
    plain: VisionFeatures = tower(pixels)
    assert fused.cls_scores_BHN is not None
    torch.testing.assert_close(fused.tokens_BNV, plain.tokens_BNV, atol=5e-3, rtol=5e-3)  # fp16, one layer apart
    torch.testing.assert_close(fused.cls_scores_BHN, plain.cls_scores_BHN, atol=1e-5, rtol=1e-5)


def test_a_tower_that_trains_keeps_its_gradients() -> None:
    tower, pixels = _tower(torch.bfloat16), _pixels()

    def gradients() -> list[Tensor]:
        tower.zero_grad()
        tower(pixels).tokens_BNV.square().sum().backward()
        return [parameter.grad.clone() for parameter in tower.parameters() if parameter.grad is not None]

    found = gradients()
    backend.use("torch")
    assert found
    for mine, theirs in zip(found, gradients(), strict=True):
        torch.testing.assert_close(mine, theirs)


@on_the_card
def test_nothing_waits_for_the_card() -> None:
    tower, selector = _tower().requires_grad_(False), AnchorSelectorConfig(num_anchors=9).build(17, 4, True)
    pixels = _pixels()
    selector(tower(pixels))  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        selector(tower(pixels))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_the_card
def test_rows_stay_fp32_where_tf32_is_allowed() -> None:
    query, key, _ = _qkv(2, 2, 65, 64, torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        row = cls_row.cls_row(query, key, 0.125)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    exact = (query[:, :, :1].double() * key.double()).sum(-1) * 0.125
    assert _error(row, exact) < 2e-6  # TF32 keeps 10 bits: its error is above 1e-4


@on_the_card
def test_kernels_asked_for_are_refused_on_the_cpu() -> None:
    with pytest.raises(UserError, match="cannot run"):
        selection.select_anchors(torch.randn(1, 4, 50), 9)
