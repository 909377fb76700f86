"""The published batches: grouped by modality and length, dealt in even chunks, padded to the longest sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anchorformer.contracts import IGNORE_INDEX, Example

Step = list[list[int]]
"""Per rank the samples of one optimizer step."""


def grouped(lengths: Sequence[int], has_image: Sequence[bool], world: int, batch: int, seed: int) -> list[Step]:
    """One epoch of LLaVA's `group_by_modality_length`.

    Samples with and without images never share a step, except at the end, where what is left of both does. Inside a
    step the samples are sorted by length and dealt to the ranks one by one, each to the rank with the smallest *sum*.

    Args:
        lengths: what LLaVA sorts by; its own are words of text, in which an image counts for nothing.
        batch: samples per rank and step.

    Returns:
        The steps; those that are not full are left out, because ranks cannot wait for each other in them.
    """
    generator = torch.Generator().manual_seed(seed)
    size = world * batch
    with_image = [index for index, has in enumerate(has_image) if has]
    without = [index for index, has in enumerate(has_image) if not has]
    if with_image and without:
        groups = [_grouped_by_length(part, lengths, world, batch, generator) for part in (with_image, without)]
        steps = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
        whole = [step for step in steps if len(step) == size]
        rest = sorted(index for step in steps if len(step) < size for index in step)
        order = torch.randperm(len(whole), generator=generator).tolist()
        flat = [index for place in order for index in whole[place]] + rest
    else:
        flat = _grouped_by_length(range(len(lengths)), lengths, world, batch, generator)
    full = [flat[start : start + size] for start in range(0, len(flat) - size + 1, size)]
    return [[step[rank * batch : (rank + 1) * batch] for rank in range(world)] for step in full]


def _grouped_by_length(
    indices: Sequence[int], lengths: Sequence[int], world: int, batch: int, generator: torch.Generator
) -> list[int]:
    shuffled = [indices[place] for place in torch.randperm(len(indices), generator=generator).tolist()]
    flat = []
    for start in range(0, len(shuffled), world * batch):
        longest_first = sorted(shuffled[start : start + world * batch], key=lambda index: lengths[index], reverse=True)
        flat += [index for chunk in _even_chunks(longest_first, lengths, world) for index in chunk]
    return flat


def _even_chunks(indices: Sequence[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Equally many samples per chunk, and sums of lengths as equal as the longest-first rule makes them."""
    if len(indices) % chunks:
        return [list(indices[chunk::chunks]) for chunk in range(chunks)]
    most = len(indices) // chunks
    dealt: list[list[int]] = [[] for _ in range(chunks)]
    sums = [0.0] * chunks
    for index in indices:
        shortest = sums.index(min(sums))
        dealt[shortest].append(index)
        sums[shortest] += lengths[index]
        if len(dealt[shortest]) == most:
            sums[shortest] = float("inf")
    return dealt


def useful_share(steps: Sequence[Step], tokens: Sequence[int]) -> float:
    """Share of the computed positions that are real, when all ranks wait for the one with the largest padded batch."""
    real = sum(tokens[index] for step in steps for share in step for index in share)
    computed = sum(len(step) * max(len(share) * max(tokens[i] for i in share) for share in step) for step in steps)
    return real / computed


def pad(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A rectangle as LLaVA's collator makes it, padded on the right.

    Returns:
        input_ids (B, L), attention_mask (B, L) int64, labels (B, L), and all tiles (images, 3, H, W).
    """
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([getattr(example, name) for example in examples], True, filler)
        for name, filler in (("input_ids_S", 0), ("labels_S", IGNORE_INDEX))
    )
    lengths = torch.tensor([example.input_ids_S.numel() for example in examples])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return ids, mask, labels, torch.cat([example.tiles_B3HW for example in examples])
