"""Useful share of a step's positions: padded batches grouped by length, against flat rows dealt by length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.contracts import Example
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from bench.lengths import Lengths, mixture, real
from bench.published import batching as published
from bench.runner import Row, Size, error
from data.collate import collate
from data.sampler import permutation, plan_step

WORLD, ANCHORS = 8, 145
GOAL = 0.95


def rows(size: Size) -> Iterator[Row]:
    steps = 7 if size is Size.tiny else 280
    difference = packed_against_separate()
    for name, lengths in (("real", real()), ("mixture", mixture(16384))):
        for batch in (4, 8, 16) if size is Size.full else (16,):
            tokens = lengths.positions(ANCHORS)
            old = published.useful_share(list(itertools.islice(_published_steps(lengths, batch), steps)), tokens)
            yield Row(
                name=f"useful positions, {name} lengths, {WORLD} ranks x {batch}, T={ANCHORS}", unit="share",
                old=old, new=useful_share(tokens, batch, steps), equal=difference < 1e-5,
                goal=GOAL if batch == 16 else None,
                note=f"old: LLaVA's group_by_modality_length, padded; {sum(tokens) / len(tokens):.0f} positions a "
                f"sample on average; equal: samples in one row have the logits of samples alone ({difference:.0e})",
            )  # fmt: skip


def useful_share(tokens: Sequence[int], batch: int, steps: int) -> float:
    """Positions of all ranks over what they could have computed while the fullest one did its own."""
    done = possible = 0
    size = WORLD * batch
    for step in itertools.islice(_steps(len(tokens), size), steps):
        lengths = [tokens[index] for index in step]
        loads = [
            sum(lengths[place] for places in share for place in places)
            for share in plan_step(lengths, WORLD, micro_batch=batch)
        ]
        done += sum(loads)
        possible += WORLD * max(loads)
    return done / possible


def _steps(samples: int, size: int) -> Iterator[list[int]]:
    """Global batches of one shuffled pass after the other, as the training sampler draws them."""
    for epoch in itertools.count():
        order = permutation(samples, "bench", epoch).tolist()
        yield from (order[start : start + size] for start in range(0, samples - size + 1, size))


def _published_steps(lengths: Lengths, batch: int) -> Iterator[published.Step]:
    has_image = [images > 0 for images in lengths.images]
    for epoch in itertools.count():
        yield from published.grouped(lengths.words, has_image, WORLD, batch, seed=epoch)


@torch.no_grad()
def packed_against_separate() -> float:
    """Largest relative difference of a toy model's logits between samples in one row and each sample alone."""
    torch.manual_seed(0)
    model = toy_model().eval()
    image = model.config.image_token_id
    examples = []
    for text, images in ((5, 1), (11, 0), (3, 2), (1, 0)):
        ids = torch.cat([torch.full((images * model.num_image_tokens,), image), torch.randint(3, 60, (text,))])
        tiles = torch.randint(0, 256, (images, 3, 28, 28), dtype=torch.uint8)
        examples.append(Example(sample_id="", input_ids_S=ids, labels_S=ids, tiles_B3HW=tiles))

    def logits(parts: Sequence[Example]) -> torch.Tensor:
        batch = collate(parts)
        out = model(
            input_ids=batch.input_ids_S[None], position_ids=batch.position_ids_S[None], cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen, pixel_values=batch.tiles_B3HW,
        )  # fmt: skip
        return out.logits[0]

    return error(logits(examples), torch.cat([logits([example]) for example in examples]))


def toy_model() -> AnchorFormerForConditionalGeneration:
    """A model of the true shape and toy size."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    config = AnchorFormerConfig(
        vision_config=vision, text_config=text, image_token_id=63,
        selector={"_target_": "anchorformer.selectors.anchor.AnchorSelectorConfig", "num_anchors": 3},
        connector={"_target_": "anchorformer.connectors.anchor_former.AnchorFormerConnectorConfig", "depth": 1},
    )  # fmt: skip
    return AnchorFormerForConditionalGeneration(config)
