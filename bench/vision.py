"""Vision tower and one layer of it: eager attention with every map, against fused attention and one [CLS] row."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from anchorformer.contracts import VisionNeeds
from anchorformer.kernels.selection import select_anchors
from anchorformer.kernels.vision_attention import VISION_ATTENTION, park_cls_scores, pop_cls_scores
from anchorformer.vision import VisionTower
from bench.published.vision import PublishedBlock, PublishedTower
from bench.runner import Row, Size, as_accurate, cpu_seconds, error, in_fresh_process, peak_bytes

ANCHORS = 145
TOKENS = {Size.tiny: (50,), Size.quick: (577, 2305), Size.full: (577, 2305, 5185)}
WHOLE = 0
"""Stands for the whole tower where memory is listed by visual tokens."""
GOALS = {577: (None, None), 2305: (1.9, 12.0), 5185: (2.1, 25.0)}
"""Visual tokens of 336, 672 and 1008 pixels: how many times faster, and smaller in memory, one layer has to be."""


def rows(size: Size) -> Iterator[Row]:
    memory = _memory(size) if size is Size.tiny else in_fresh_process(_memory, size)
    for tokens in TOKENS[size]:
        yield from _layer(tokens, size, memory[tokens])
    if size is not Size.quick:
        yield from _tower(size, memory[WHOLE])


def _memory(size: Size) -> dict[int, tuple[int, int]]:
    """Peak bytes of one layer, by its visual tokens, and of the whole tower: published and ours."""
    torch.manual_seed(0)
    config = clip_config(size)
    eager, fused = (_block(config, attention).bfloat16() for attention in ("eager", VISION_ATTENTION))
    published, ours = PublishedBlock(eager), _OurBlock(fused)
    found = {}
    for tokens in TOKENS[size]:
        x = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16)
        found[tokens] = peak_bytes(partial(published, x)), peak_bytes(partial(ours, x))
    if size is not Size.quick:
        model = CLIPVisionModel(config).requires_grad_(False).bfloat16()
        pixels = torch.randn(1, 3, config.image_size, config.image_size, dtype=torch.bfloat16)
        tower = _tower_of_ours(model)
        found[WHOLE] = peak_bytes(partial(PublishedTower(model), pixels)), peak_bytes(partial(tower, pixels))
    return found


def clip_config(size: Size = Size.full) -> CLIPVisionConfig:
    """CLIP-L/14-336, or a toy of its shape."""
    if size is Size.tiny:
        return CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=98,
            patch_size=14,
        )
    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip


@torch.no_grad()
def spread(model: nn.Module) -> nn.Module:
    """Widens the attention of random weights: fresh ones attend to everything alike, which no trained tower does.

    Logits get a standard deviation of 1.8, that is probabilities one of 5 times their mean.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.normal_(0, (1.8 / parameter.shape[1]) ** 0.5)
    return model


def _layer(tokens: int, size: Size, peaks: tuple[int, int]) -> Iterator[Row]:
    config = clip_config(size)
    torch.manual_seed(0)
    eager = _block(config, "eager")
    exact, fused = _block(config, "eager", eager), _block(config, VISION_ATTENTION, eager)
    x = torch.randn(1, tokens, config.hidden_size)
    reference, reference_row = PublishedBlock(exact)(x)
    del exact
    x = x.bfloat16()
    published = PublishedBlock(eager.bfloat16())
    ours = _OurBlock(fused.bfloat16())
    old, old_row = published(x)
    new, new_row = ours(x)
    equal = as_accurate(new, old, reference) and as_accurate(new_row.softmax(-1), old_row, reference_row)
    time_goal, memory_goal = GOALS.get(tokens, (None, None))
    seconds = cpu_seconds({"old": lambda: published(x), "new": lambda: ours(x)}, repeats=3)
    where = f"one vision layer, N={tokens}, bf16"
    rule = "equal: output and [CLS] row at most twice as far from fp32 as the eager ones"
    yield Row(
        name=f"{where}: time", unit="ms", old=seconds["old"] * 1e3, new=seconds["new"] * 1e3, equal=equal,
        goal_ratio=time_goal, note=rule,
    )  # fmt: skip
    yield Row(
        name=f"{where}: transient memory", unit="MB", old=peaks[0] / 1e6, new=peaks[1] / 1e6, equal=equal,
        goal_ratio=memory_goal, note=rule,
    )  # fmt: skip


def _block(config: CLIPVisionConfig, attention: str, weights: nn.Module | None = None) -> nn.Module:
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    block = spread(CLIPEncoderLayer(config)).requires_grad_(False).eval()
    if weights is not None:
        block.load_state_dict(weights.state_dict())
    return block


class _OurBlock:
    def __init__(self, block: nn.Module) -> None:
        self.block = block
        (self._attention,) = (module for module in block.modules() if hasattr(module, "is_causal"))
        park_cls_scores(self._attention)

    @torch.no_grad()
    def __call__(self, tokens_BNV: Tensor) -> tuple[Tensor, Tensor]:
        out = self.block(tokens_BNV, attention_mask=None)
        scores = pop_cls_scores(self._attention)
        assert scores is not None
        return out, scores


@dataclass(frozen=True)
class _Both:
    old: Tensor
    new: Tensor
    overlap: float
    """Share of the anchors that both paths choose."""


def _both(model: CLIPVisionModel, pixels: Tensor, anchors: int) -> _Both:
    new = _tower_of_ours(model)(pixels)
    old, old_row = PublishedTower(model)(pixels)
    assert new.cls_scores_BHN is not None
    chosen = [set(select_anchors(row, anchors)[0].tolist()) for row in (old_row, new.cls_scores_BHN)]
    return _Both(old, new.tokens_BNV, len(chosen[0] & chosen[1]) / anchors)


def _tower_of_ours(model: CLIPVisionModel) -> VisionTower:
    return VisionTower(copy.deepcopy(model), VisionNeeds(layer=-2, cls_scores=True))


def _tower(size: Size, peaks: tuple[int, int]) -> Iterator[Row]:
    config = clip_config(size)
    anchors = ANCHORS if size is not Size.tiny else 1 + 2 * config.num_attention_heads
    torch.manual_seed(0)
    model = spread(CLIPVisionModel(config)).requires_grad_(False)
    pixels = torch.randn(1, 3, config.image_size, config.image_size)
    in_fp32 = _both(model, pixels, anchors)
    equal_fp32 = in_fp32.overlap == 1 and error(in_fp32.new, in_fp32.old) < 1e-5
    model.bfloat16()
    in_bf16 = _both(model, pixels, anchors)
    # Rounding moves anchors across the border of a ranking in any bf16 path: the published one differs from fp32 too.
    # A toy's few anchors say nothing in shares.
    close = in_bf16.overlap >= 0.95 or size is Size.tiny
    equal = equal_fp32 and close and as_accurate(in_bf16.new, in_bf16.old, in_fp32.old)
    note = (
        f"equal: in fp32 tokens to 1e-5 and the same anchors; in bf16 tokens at most twice as far from fp32 as the "
        f"published ones ({error(in_bf16.new, in_fp32.old):.1e}, {error(in_bf16.old, in_fp32.old):.1e}) and 95 % of "
        f"the anchors the same ({in_bf16.overlap:.1%} of {anchors})"
    )
    pixels = pixels.bfloat16()
    ours, published = _tower_of_ours(model), PublishedTower(model)
    seconds = cpu_seconds({"old": lambda: published(pixels), "new": lambda: ours(pixels)}, repeats=3)
    where = f"vision tower, {config.image_size} pixels, bf16"
    goals: tuple[float | None, float | None] = (1.5, 15.0) if size is Size.full else (None, None)
    yield Row(
        name=f"{where}: time", unit="s", old=seconds["old"], new=seconds["new"], equal=equal, goal_ratio=goals[0],
        note=note,
    )  # fmt: skip
    yield Row(
        name=f"{where}: peak memory", unit="MB", old=peaks[0] / 1e6, new=peaks[1] / 1e6, equal=equal,
        goal_ratio=goals[1], note=note,
    )  # fmt: skip
