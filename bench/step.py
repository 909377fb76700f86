"""Forward and backward of both stages: everything as published, against everything of ours, on the same samples.

Mid-size, because a CPU has to do it: ViT-B/14 at 336 pixels and 8 layers of a 7B Llama, in bf16, batch 4. The optimizer
is left out of both: it costs the same and would only dilute the ratio.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from anchorformer.contracts import Batch
from anchorformer.kernels.attention import TEXT_ATTENTION
from anchorformer.lean import make_lean
from bench import lengths
from bench.gpu.as_published import (
    PaddedBatch,
    PublishedSelector,
    collate_padded,
    padded_logits,
    padded_loss,
    published_vision,
)
from bench.gpu.ladder import draw
from bench.gpu.shapes import (
    Length,
    Scale,
    build_language_model,
    build_model,
    make_examples,
    read_lengths,
    stage_config,
    tiny_scale,
)
from bench.published.connector import PublishedConnector
from bench.runner import Row, Size, as_accurate, cpu_seconds, error
from bench.vision import spread
from data.collate import collate
from train.loss import supervised_loss
from train.stage import freeze

BATCH = 4
GOALS = {1: 1.8, 2: 2.5}
"""How many times faster, by stage."""


def rows(size: Size) -> Iterator[Row]:
    if size is Size.quick:
        return
    scale = tiny_scale() if size is Size.tiny else mid_scale()
    pair = _Pair(scale)
    samples = read_lengths(lengths.FILE, tiny=size is Size.tiny)
    for stage, name in ((1, "captions"), (2, "counted")):
        yield from _stage(pair, stage, samples[stage][name], size)


def mid_scale() -> Scale:
    """ViT-B/14 at 336 pixels and the first 8 layers of a 7B Llama, bf16, on the CPU."""
    return replace(
        tiny_scale(),
        dtype=torch.bfloat16,
        vision={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 336, "patch_size": 14, "projection_dim": 512,
        },
        text={
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        },
        num_anchors=145,
        connector={},
    )  # fmt: skip


class _Pair:
    """Two models over one set of weights: all parts as published, all parts ours."""

    def __init__(self, scale: Scale) -> None:
        self.image_tokens = scale.num_anchors
        plain = build_language_model(scale)
        self.ours = build_model(scale, "anchor_former", _lean_twin(plain))
        # Else the anchors are a matter of rounding, and the two paths see different images.
        spread(self.ours.vision_tower)
        self.published = build_model(scale, "anchor_former", plain)
        parts: Any = self.published
        parts.vision_tower = published_vision(scale, self.ours.vision_tower)
        parts.selector = PublishedSelector(scale.num_anchors)
        parts.connector = PublishedConnector(self.ours.connector)


def _lean_twin(plain: Any) -> Any:
    with torch.device("meta"):
        lean = AutoModelForCausalLM.from_config(plain.config, attn_implementation=TEXT_ATTENTION)
    lean.load_state_dict(plain.state_dict(keep_vars=True), assign=True)
    # Buffers that no state dict holds: the frequencies of the rotation.
    lean.model.rotary_emb = plain.model.rotary_emb
    make_lean(lean)
    return lean


def _stage(pair: _Pair, stage: int, found: list[Length], size: Size) -> Iterator[Row]:
    samples = _one_rank(stage, found, pair.image_tokens)
    ours, published = pair.ours, pair.published
    freeze(ours, stage_config(stage))  # the weights of both
    examples = make_examples(ours, samples)
    supervised = sum(length.supervised for length in samples)
    batch, padded = collate(examples), collate_padded(examples)

    def new() -> list[Tensor]:
        return _step(pair, ours, lambda: supervised_loss(ours, batch, supervised))

    def old(checkpointing: bool) -> list[Tensor]:
        with warnings.catch_warnings():
            # transformers 5.23 has other names for these, which 5.17 does not know.
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing")
            if checkpointing:
                published.language_model.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                published.language_model.gradient_checkpointing_disable()
        return _step(pair, published, lambda: padded_loss(published, padded, supervised, all_logits=True))

    results: dict[str, list[Tensor]] = {}
    calls: dict[str, Callable[[], object]] = {
        "new": lambda: results.update(new=new()),
        "checkpointed": lambda: results.update(checkpointed=old(checkpointing=True)),
        "kept": lambda: results.update(kept=old(checkpointing=False)),
    }
    seconds = cpu_seconds(calls, repeats=1, warm_up=size is Size.tiny)
    exact = ours.dtype is torch.float32
    rounding = None if exact else _logits(pair, batch, padded)
    positions = [length.positions(pair.image_tokens) for length in samples]
    for name, how in (("checkpointed", "with checkpointing"), ("kept", "without checkpointing")):
        if rounding is None:
            difference = max(map(error, results["new"], results[name]))
            equal, rule = difference < 1e-4, f"loss and gradients to 1e-4 ({difference:.0e})"
        else:
            (mine, theirs, reference), (loss, other) = rounding, (results["new"][0], results[name][0])
            equal = as_accurate(mine, theirs, reference)
            rule = (
                f"logits at most twice as far from fp32 as the published ones ({error(mine, reference):.1e}, "
                f"{error(theirs, reference):.1e}); losses differ by {error(loss, other):.0e}"
            )
        yield Row(
            name=f"stage-{stage} step, batch {BATCH}, {how} in the published one", unit="s", old=seconds[name],
            new=seconds["new"], equal=equal, goal_ratio=None if size is Size.tiny else GOALS[stage],
            note=f"forward and backward, {sum(positions)} real positions, {BATCH * max(positions)} padded, "
            f"{supervised} supervised; equal: {rule}",
        )  # fmt: skip


@torch.no_grad()
def _logits(pair: _Pair, batch: Batch, padded: PaddedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """At the supervised positions: ours and the published ones in bf16, and ours in fp32, where the paths are equal.

    In bf16 a loss may differ by more than its rounding: the paths choose a few other anchors, as any rounding does.
    """
    exact = copy.deepcopy(pair.ours).float()
    reference = _flat_logits(exact, batch)
    del exact
    return _flat_logits(pair.ours, batch), padded_logits(pair.published, padded), reference


def _flat_logits(model: Any, batch: Batch) -> Tensor:
    """(Q, C) of a flat batch at its supervised positions."""
    logits: list[Tensor] = []

    def forward(**inputs: Any) -> Any:
        out = model(**inputs)
        logits.append(out.logits[0])
        return out

    supervised_loss(forward, batch, 1)
    return logits[0]


def _one_rank(stage: int, found: list[Length], image_tokens: int) -> list[Length]:
    """The four samples of a rank whose padding is the middle one, in a step whose padding is the middle one."""
    step = draw(stage, found, image_tokens, BATCH)

    def real_share(share: list[int]) -> float:
        positions = [step.lengths[index].positions(image_tokens) for index in share]
        return sum(positions) / (len(positions) * max(positions))

    shares = sorted(step.published, key=real_share)
    return [step.lengths[index] for index in shares[len(shares) // 2]]


def _step(pair: _Pair, model: Any, loss: Callable[[], Tensor]) -> list[Tensor]:
    """The loss and the gradients of the connector, which trains in both stages; all gradients are let go."""
    model.train()
    value = loss()
    value.backward()
    found = [value.detach(), *(weight.grad for weight in pair.ours.connector.parameters() if weight.grad is not None)]
    pair.ours.zero_grad(set_to_none=True)
    return found
