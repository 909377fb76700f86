"""Configs, models and batches that several training tests are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anchorformer.contracts import IGNORE_INDEX, Batch, Example
from anchorformer.schema import parse
from data.collate import collate
from train.config import RunConfig
from train.stage import freeze

ALIGN = {"connector": {"lr": 1e-2}}
FINETUNE = {"connector": {"lr": 1e-3}, "language_model": {"lr": 5e-4, "weight_decay": 0.1}}
EVERYTHING = {**FINETUNE, "vision_tower": {"lr": 1e-4}}


def run_config(trains: dict[str, Any], **changes: Any) -> RunConfig:
    """A small run; `changes` are dotted keys with `__` for the dot."""
    values: dict[str, Any] = {
        "run": "test",
        "stage": {"name": "align", "trains": trains, "template": "plain", "global_batch": 8, "max_steps": 4,
                  "epochs": None, "warmup_ratio": 0.0},
        "model": {"vision": "-", "language_model": "-", "selector": {}, "connector": {}},
        "data": {"root": "-", "sources": {}},
        "hardware": {"device": "cpu", "ranks": 1, "micro_batch": 8, "precision": "fp32"},
        "engine": "plain",
    }  # fmt: skip
    for key, value in changes.items():
        group, *rest = key.split("__")
        if rest:
            values.setdefault(group, {})[rest[0]] = value
        else:
            values[group] = value
    return parse(RunConfig, values, "test")


def load_frozen(folder: Path, config: RunConfig, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model of a folder with the config's stage applied."""
    from anchorformer.weights import load_model

    model = load_model(folder, dtype)
    freeze(model, config.stage)
    return model


def examples_for(model: Any, seed: int = 0) -> list[Example]:
    """Eight samples of uneven length and targets; the fourth to sixth have no image, the last has no target. With a
    tiling, images have as many tiles as it allows, in turn."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.text_config.vocab_size
    placeholder = model.config.image_token_id
    side = model.vision_tower.image_size
    examples = []
    for number in range(8):
        has_image = number not in (3, 4, 5)
        length = int(torch.randint(4, 18, (1,), generator=generator))
        text = torch.randint(5, min(vocabulary, placeholder), (length,), generator=generator)
        tiles_of = [model.tiling.counts[number % len(model.tiling.counts)]] if has_image else []
        tiles = torch.randint(0, 256, (sum(tiles_of), 3, side, side), dtype=torch.uint8, generator=generator)
        counts = None if model.num_image_tokens is not None else seen(model, tiles, tiles_of)
        positions = sum(counts or (model.num_image_tokens or 0,) * sum(map(model.tiling.views, tiles_of)))
        ids = torch.cat([text[:2], torch.full((positions,), placeholder), text[2:]])
        labels = ids.clone()
        num_targets = 0 if number == 7 else 1 + number
        labels[: len(ids) - num_targets] = IGNORE_INDEX
        examples.append(
            Example(
                sample_id=f"s{number}",
                input_ids_S=ids,
                labels_S=labels,
                tiles_B3HW=tiles,
                tile_counts=tuple(tiles_of),
                token_counts=counts,
            )
        )
    return examples


@torch.no_grad()
def seen(model: Any, tiles_B3HW: torch.Tensor, tile_counts: Sequence[int]) -> tuple[int, ...]:
    """Embeddings of each tile, of a model of which the image decides."""
    return model.encode_views(tiles_B3HW, tile_counts)[1] if tile_counts else ()  # type: ignore[no-any-return]


def filler_for(model: Any) -> Example:
    """What a rank computes where it has no sample."""
    side = model.vision_tower.image_size
    return Example(
        sample_id="", input_ids_S=torch.tensor([1]), labels_S=torch.tensor([IGNORE_INDEX]),
        tiles_B3HW=torch.zeros(0, 3, side, side, dtype=torch.uint8),
    )  # fmt: skip


def batches_for(model: Any, deal: Sequence[Sequence[int]], seed: int = 0) -> list[Batch]:
    """One rank's micro-batches of one step; an empty one keeps step."""
    examples, filler = examples_for(model, seed), filler_for(model)
    return [collate([examples[number] for number in numbers], filler) for numbers in deal]
