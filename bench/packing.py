"""Useful share of a step's compute: padded batches grouped by length, against flat rows dealt by length."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.contracts import Example
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from bench.gpu.shapes import plan_shapes, published_scale
from bench.lengths import Lengths, mixture, real
from bench.published import batching as published
from bench.runner import Row, Size, error
from data.collate import collate
from data.sampler import permutation, plan_step
from train.choices import Part
from train.plan.flops import Work, model_flops

WORLD, ANCHORS = 8, 145
GOAL = 0.95
TRAINS = (Part.connector, Part.language_model)


def rows(size: Size) -> Iterator[Row]:
    steps = 7 if size is Size.tiny else 280
    difference = packed_against_separate()
    for name, lengths in (("real", real()), ("mixture", mixture(16384))):
        costs = Costs(lengths)
        for batch in (4, 8, 16) if size is Size.full else (16,):
            old = useful_share(map(costs.padded, itertools.islice(_published_steps(lengths, batch), steps)))
            new = useful_share(map(costs.packed, itertools.islice(_our_steps(costs.positions, batch), steps)))
            yield Row(
                name=f"useful compute of stage 2, {name} lengths, {WORLD} ranks x {batch}, T={ANCHORS}", unit="share",
                old=old, new=new, equal=difference < 1e-5, goal=GOAL if batch == 16 else None,
                note="FLOPs of CLIP-L/336 and a 7B language model over what all ranks could have done while the "
                f"slowest did its own; old: LLaVA's group_by_modality_length, padded; {costs.mean:.0f} positions a "
                f"sample on average; equal: samples in one row have the logits of samples alone ({difference:.0e})",
            )  # fmt: skip


class Costs:
    """FLOPs of each rank of a step: what its samples are worth, and what it computes for them.

    Supervised positions cost the head on both sides what they do in ours, so that only padding and waiting count.
    """

    def __init__(self, lengths: Lengths) -> None:
        self.lengths, self.positions = lengths, lengths.positions(ANCHORS)
        self.mean = sum(self.positions) / len(self.positions)
        self._shapes = plan_shapes(published_scale(), "anchor_former")

    def padded(self, step: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
        """Each rank pads its samples to its longest one."""
        return [(self._flops(share), self._flops(share, max(self.positions[i] for i in share))) for share in step]

    def packed(self, step: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
        """Nothing is padded."""
        return [(self._flops(share), self._flops(share)) for share in step]

    def _flops(self, share: Sequence[int], padded_to: int | None = None) -> float:
        positions = [padded_to or self.positions[index] for index in share]
        work = Work(
            positions=sum(positions), squares=sum(count**2 for count in positions),
            supervised=sum(self.lengths.supervised[index] for index in share),
            images=sum(self.lengths.images[index] for index in share),
        )  # fmt: skip
        return sum(model_flops(self._shapes, TRAINS, work).values())


def useful_share(steps: Iterable[list[tuple[float, float]]]) -> float:
    """Useful FLOPs of all ranks over what they could have computed while the slowest one did its own.

    Args:
        steps: per rank its useful and its computed FLOPs.
    """
    useful = possible = 0.0
    for step in steps:
        useful += sum(real for real, _ in step)
        possible += len(step) * max(computed for _, computed in step)
    return useful / possible


def _our_steps(positions: Sequence[int], batch: int) -> Iterator[list[list[int]]]:
    """Global batches of one shuffled pass after the other, as the training sampler draws them, dealt to the ranks."""
    size = WORLD * batch
    for epoch in itertools.count():
        order = permutation(len(positions), "bench", epoch).tolist()
        for start in range(0, len(order) - size + 1, size):
            step = order[start : start + size]
            plan = plan_step([positions[index] for index in step], WORLD, micro_batch=batch)
            yield [[step[place] for micro in share for place in micro] for share in plan]


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
