"""The sizes that are measured, and models and samples of those sizes made of random numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig, PreTrainedModel

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.contracts import IGNORE_INDEX, Example
from anchorformer.kernels.attention import TEXT_ATTENTION
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.parts import parse_parts
from anchorformer.schema import parse
from anchorformer.vision import VisionTower
from bench.lengths import Lengths, mixture
from train.config import StageConfig
from train.plan.shapes import Shapes, shapes_of

CONF = Path(__file__).resolve().parents[2] / "conf"
STAGES = {1: "align", 2: "finetune"}
CONNECTORS = {"mlp": ("all", "mlp"), "resampler": ("all", "resampler"), "anchor_former": ("anchor", "anchor_former")}
"""Kind of model -> its selector and connector, by the names of their YAML files."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where and at which size a command runs: the published shapes on a card, or toys on the CPU.

    Attributes:
        vision: fields of a CLIP vision config.
        text: fields of a Llama config.
        num_anchors: T of the anchor selector and, without [CLS], queries of the resampler.
        connector: fields in which connectors differ from their YAML, where they have them.
        sides: image sides that the single operations are measured at.
        matmul_side, copy_bytes: of the ceilings.
    """

    device: torch.device
    dtype: torch.dtype
    vision: dict[str, Any]
    text: dict[str, Any]
    num_anchors: int
    connector: dict[str, Any]
    sides: tuple[int, ...]
    matmul_side: int
    copy_bytes: int

    @property
    def vision_config(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(**self.vision)

    @property
    def text_config(self) -> LlamaConfig:
        return LlamaConfig(**self.text)

    @property
    def vision_batches(self) -> list[tuple[int, int, int]]:
        """(image side, visual tokens, images): 336 x 32, 672 x 4 and 1008 x 1 at the published sizes."""
        patch = self.vision["patch_size"]
        return [(side, (side // patch) ** 2 + 1, batch) for side, batch in zip(self.sides, (32, 4, 1), strict=False)]

    @property
    def image_token_id(self) -> int:
        """A word of the vocabulary given up as placeholder, so that no matrix becomes one row longer than published."""
        return int(self.text["vocab_size"]) - 1

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"


def _published(group: str, name: str) -> dict[str, Any]:
    """The one backbone's config.json that a YAML of conf/ states."""
    (config,) = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())["published"].values()
    return {key: value for key, value in config.items() if key != "model_type"}


def published_scale() -> Scale:
    """CLIP ViT-L/14 at 336 pixels and Vicuna-7B v1.5 in bf16 on the first CUDA device."""
    return Scale(
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        vision=_published("vision", "clip_l_336"),
        text=_published("llm", "vicuna_7b"),
        num_anchors=145,
        connector={},
        sides=(336, 672, 1008),
        matmul_side=8192,
        copy_bytes=4 << 30,
    )  # fmt: skip


def tiny_scale() -> Scale:
    """The same structure at toy sizes on the CPU: shows that the code runs, and nothing else."""
    return Scale(
        device=torch.device("cpu"),
        dtype=torch.float32,
        vision={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": 28, "patch_size": 4, "projection_dim": 32,
        },
        text={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "vocab_size": 128, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        },
        num_anchors=9,
        connector={"depth": 2, "num_heads": 2, "head_dim": 8},
        sides=(28,),
        matmul_side=64,
        copy_bytes=1 << 16,
    )  # fmt: skip


def stage_config(stage: int) -> StageConfig:
    """The recipe's own stage, from conf/."""
    path = CONF / "stage" / f"{STAGES[stage]}.yaml"
    return parse(StageConfig, yaml.safe_load(path.read_text()), str(path))


def parts_of(kind: str, scale: Scale, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Selector and connector of a kind of model as plug-in mappings, from conf/, at the scale's number of anchors.

    Args:
        changes: fields of the connector that are to differ from its YAML.
    """
    selector, connector = (
        yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
        for group, name in zip(("selector", "connector"), CONNECTORS[kind], strict=True)
    )
    if "num_anchors" in selector:
        selector["num_anchors"] = scale.num_anchors
    if "num_queries" in connector:
        connector["num_queries"] = scale.num_anchors - 1
    sized = {name: value for name, value in scale.connector.items() if name in connector}
    return selector, connector | sized | changes


@contextmanager
def made_in(scale: Scale) -> Iterator[None]:
    """Modules built inside this block have their weights on the scale's device, in its dtype, drawn from one seed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(scale.dtype)
    torch.manual_seed(0)
    try:
        with scale.device:
            yield
    finally:
        torch.set_default_dtype(before)


def build_language_model(scale: Scale) -> PreTrainedModel:
    """A language model as Hugging Face builds it, with our attention and nothing else of ours."""
    with made_in(scale):
        return AutoModelForCausalLM.from_config(
            scale.text_config, attn_implementation=TEXT_ATTENTION, dtype=scale.dtype
        )


def build_model(
    scale: Scale, kind: str, language_model: PreTrainedModel, **changes: Any
) -> AnchorFormerForConditionalGeneration:
    """Our model around a given language model; tower and connector are fresh.

    Args:
        changes: fields of the connector that are to differ from its YAML.
    """
    selector, connector = parts_of(kind, scale, **changes)
    config = AnchorFormerConfig(
        vision_config=scale.vision_config, text_config=scale.text_config, selector=selector, connector=connector,
        image_token_id=scale.image_token_id, dtype=scale.dtype,
    )  # fmt: skip
    with torch.device("meta"):
        model = AnchorFormerForConditionalGeneration(config)
    selector_config, connector_config = parse_parts(selector, connector)
    with made_in(scale):
        model.vision_tower = VisionTower.from_config(scale.vision_config, selector_config.needs)
        model.connector = connector_config.build(model.vision_tower.width, scale.text_config.hidden_size)
    model.language_model = language_model
    return model


def plan_shapes(scale: Scale, kind: str) -> Shapes:
    """The same model's sizes as `train.plan` counts with them."""
    return shapes_of(scale.vision_config.to_dict(), scale.text_config.to_dict(), *parts_of(kind, scale))


@dataclass(frozen=True, slots=True)
class Length:
    """What a sample costs.

    Attributes:
        text: positions without its images.
        supervised: how many of those.
        words: what LLaVA's sampler calls its length.
    """

    text: int
    supervised: int
    images: int = 1
    words: int = 0

    def positions(self, num_image_tokens: int) -> int:
        return self.text + self.images * num_image_tokens


def image_tokens(model: AnchorFormerForConditionalGeneration) -> int:
    """Embeddings of an image; benchmarks are of models that have a fixed number."""
    assert model.num_image_tokens is not None
    return model.num_image_tokens


def make_examples(
    model: AnchorFormerForConditionalGeneration, lengths: Sequence[Length], seed: int = 0
) -> list[Example]:
    """Samples of these lengths: images after the first word, the last positions supervised."""
    generator = torch.Generator().manual_seed(0)
    placeholder, side = model.image_token_id, int(cast(Any, model.vision_tower).image_size)
    examples = []
    for number, length in enumerate(lengths):
        words = torch.randint(0, placeholder, (length.text,), generator=generator)
        image = torch.full((length.images * image_tokens(model),), placeholder)
        ids = torch.cat([words[:1], image, words[1:]])
        labels = ids.clone()
        labels[: len(ids) - length.supervised] = IGNORE_INDEX
        tiles = torch.randint(0, 256, (length.images, 3, side, side), dtype=torch.uint8, generator=generator)
        examples.append(Example(sample_id=f"s{number}", input_ids_S=ids, labels_S=labels, tiles_B3HW=tiles))
    return examples


LONGEST = 2048
"""Positions of the longest sample that the recipe trains on."""
CAPTION_TOKENS, CAPTION_SIGMA = 18, 0.4
"""Mean and spread (sigma of the logarithm) of LLaVA-558k's captions in tokens, assumed."""


def read_lengths(path: Path, *, tiny: bool) -> dict[int, dict[str, list[Length]]]:
    """Stage -> name -> samples: the counted instruction records of a file, the assumed mixture, assumed captions.

    Args:
        tiny: texts of a sixteenth of their length.
    """
    instructions = {"counted": Lengths(**json.loads(path.read_text())), "mixture": mixture(4096)}
    normal = torch.randn(1024, generator=torch.Generator().manual_seed(0)).tolist()
    captions = [max(4, round(CAPTION_TOKENS * math.exp(CAPTION_SIGMA * z - CAPTION_SIGMA**2 / 2))) for z in normal]
    found = {
        1: {"captions": [Length(text=text, supervised=text - 1) for text in captions]},
        2: {
            name: [Length(*sample) for sample in zip(some.text, some.supervised, some.images, some.words, strict=True)]
            for name, some in instructions.items()
        },
    }
    if not tiny:
        return found
    return {
        stage: {name: [_shrunk(length) for length in some] for name, some in of.items()} for stage, of in found.items()
    }


def _shrunk(length: Length) -> Length:
    return replace(length, text=2 + length.text // 16, supervised=1 + length.supervised // 16)
