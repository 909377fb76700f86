"""The tiny vision tower: a CLIP that learns by contrast which caption belongs to which picture."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig as HfClipConfig
from transformers import CLIPModel, PreTrainedTokenizerFast

from miniworld.config import ClipConfig
from miniworld.loop import computes_bf16, fit
from miniworld.pictures import SIZE
from miniworld.world import DOMAINS, Split, entry

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""The published CLIP normalisation (openai/CLIP)."""

PATCH = 12
TEXT_LENGTH = 40

PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": {"height": SIZE, "width": SIZE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": SIZE},
}
"""preprocessor_config.json, as published CLIP folders carry it."""


class Pool(NamedTuple):
    """Pictures of all domains with their captions, ready to be batched."""

    pixels_M3HW: Tensor
    """uint8."""
    ids_ML: Tensor
    """int64, right padded."""


def build_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    shared = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}
    vision = {**shared, "num_hidden_layers": 4, "image_size": SIZE, "patch_size": PATCH}
    text = {
        **shared,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = HfClipConfig(vision_config=vision, text_config=text, projection_dim=128)
    # Written-out attention is several times faster than the fused one at this size on a CPU.
    for part in (config, config.vision_config, config.text_config):
        part._attn_implementation = "eager"
    return CLIPModel(config)


def train_clip(config: ClipConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[CLIPModel, float]:
    """The model and its final training loss."""
    torch.manual_seed(config.seed)
    model = build_clip(tokenizer)
    pool = draw_pool(Split.train, "clip", config.pictures, tokenizer, config.seed)
    loss = fit(
        model, _batches(config, pool), contrast, steps=config.steps, lr=config.lr, weight_decay=0.05, name="tiny clip",
        position=0,
    )  # fmt: skip
    return model, loss


def draw_pool(split: Split, stream: str, count: int, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Pool:
    """`count` pictures, a third of each domain."""
    pixels = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
    captions = []
    for index in tqdm(range(count), desc="drawing for the tiny clip", unit="img", leave=False):
        item = entry(tuple(DOMAINS)[index % len(DOMAINS)], split, stream, index, seed)
        pixels[index] = torch.from_numpy(np.array(item.draw())).permute(2, 0, 1)
        captions.append(f"<bos>{item.caption}<eos>")
    ids = tokenizer(captions, add_special_tokens=False, padding="max_length", max_length=TEXT_LENGTH)["input_ids"]
    return Pool(pixels, torch.tensor(ids))


def contrast(model: CLIPModel, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Symmetric in-batch softmax contrast (CLIP, arXiv 2103.00020, figure 3)."""
    logits = similarity(model, *batch)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def similarity(model: CLIPModel, pixels: Tensor, ids: Tensor) -> Tensor:
    """Scaled cosine of every picture (rows) with every caption (columns), fp32."""
    out = model(input_ids=ids, pixel_values=normalise(pixels))
    return out.logits_per_image.float()


def normalise(pixels: Tensor) -> Tensor:
    mean, std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


@torch.no_grad()
def recall_at_1(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, groups: int = 6, group: int = 100) -> float:
    """Share of held-out pictures whose own caption is the nearest of 100."""
    pool = draw_pool(Split.val, "clip-eval", groups * group, tokenizer)
    hits = 0
    for at in range(0, groups * group, group):
        with torch.autocast("cpu", torch.bfloat16, enabled=computes_bf16()):
            logits = similarity(model, pool.pixels_M3HW[at : at + group], pool.ids_ML[at : at + group])
        hits += int((logits.argmax(1) == torch.arange(group)).sum())
    return hits / (groups * group)


@torch.no_grad()
def attention_entropy(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, pictures: int = 120) -> list[float]:
    """Entropy of [CLS] attention in the last but one layer, per head, as a share of the uniform one's.

    Anchors are taken from where [CLS] looks, so at least some heads must be well below 1.
    """
    pool = draw_pool(Split.val, "clip-eval", pictures, tokenizer)
    out = model.vision_model(pixel_values=normalise(pool.pixels_M3HW), output_attentions=True)
    row_BHN = out.attentions[-2][:, :, 0]
    entropy_BH = -(row_BHN * row_BHN.clamp_min(1e-12).log()).sum(-1)
    return (entropy_BH.mean(0) / np.log(row_BHN.shape[-1])).tolist()


def _batches(config: ClipConfig, pool: Pool) -> Iterator[tuple[Tensor, Tensor]]:
    rng = random.Random(f"{config.seed}:clip")
    order = list(range(len(pool.ids_ML)))
    while True:
        rng.shuffle(order)
        for at in range(0, len(order) - config.batch + 1, config.batch):
            chosen = torch.tensor(order[at : at + config.batch])
            ids = pool.ids_ML[chosen]
            longest = int((ids != 0).sum(1).max())
            yield pool.pixels_M3HW[chosen], ids[:, :longest]
