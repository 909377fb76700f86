"""The memory model against tensors: bytes that true-size layers keep for backward, and the five published points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from anchorformer.connectors.anchor_former import AnchorFormerConnectorConfig
from anchorformer.connectors.c_abstractor import CAbstractorConfig
from anchorformer.connectors.identity import IdentityConfig
from anchorformer.connectors.mlp import MlpConfig
from anchorformer.connectors.qformer import QFormerConfig
from anchorformer.connectors.resampler import ResamplerConfig
from anchorformer.connectors.resampler_flamingo import FlamingoResamplerConfig
from anchorformer.connectors.resampler_honeybee import HoneybeeResamplerConfig
from anchorformer.connectors.resampler_mqt import MqtResamplerConfig
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.kernels import attention
from anchorformer.kernels.backend import Backend
from anchorformer.kernels.vision_attention import VISION_ATTENTION
from anchorformer.lean import make_lean
from anchorformer.schema import plugin_to_plain
from train.choices import Part
from train.plan.memory import Layout, MicroBatch, rank_memory, text_layer, vision_layer
from train.plan.shapes import Shapes, shapes_of

CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
VICUNA_7B = {"model_type": "llama"}
ANCHOR = {"_target_": "anchorformer.selectors.anchor.AnchorSelectorConfig", "layer": -2, "num_anchors": 145}
ALL = {"_target_": "anchorformer.selectors.all.AllSelectorConfig", "layer": -2}
ANCHOR_FORMER = AnchorFormerConnectorConfig()
ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BF16 = 2
WITHIN = 0.1
"""What issue and plan promise. Most of these are exact but for the norms' statistics."""


def shapes(selector: Any = ANCHOR, config: Any = ANCHOR_FORMER, text: Any = VICUNA_7B) -> Shapes:
    return shapes_of(CLIP_L, text, selector, plugin_to_plain(config))


def kept_bytes(modules: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of all storages that autograd keeps, weights not counted; a storage counts once."""
    own = {value.untyped_storage().data_ptr() for value in [*modules.parameters(), *modules.buffers()]}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention as on CUDA at every size: without a matrix of scores."""
    monkeypatch.setattr(attention, "choose", lambda *_, **__: Backend.sdpa)


def on_cpu(build: Callable[[], nn.Module], is_trained: bool) -> nn.Module:
    """In bf16, all zeros: making up random numbers would take most of the test's time."""
    with torch.device("meta"):
        module = build().to(torch.bfloat16).requires_grad_(is_trained)
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for value in module.parameters():
            value.zero_()
    return module


def an_activation(*shape: int) -> Tensor:
    """As behind another layer: with a graph."""
    return torch.ones(*shape, dtype=torch.bfloat16, requires_grad=True) * 1


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "as transformers writes it"])
@pytest.mark.parametrize("is_trained", [False, True], ids=["frozen", "trained"])
def test_a_layer_of_7b(fused: None, is_trained: bool, lean: bool) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    positions, config = 64, LlamaConfig(attn_implementation=attention.TEXT_ATTENTION)
    layer = on_cpu(lambda: LlamaDecoderLayer(config, 0), is_trained)
    if lean:
        make_lean(layer)
    hidden, turns = an_activation(1, positions, 4096), torch.ones(1, positions, 128, dtype=torch.bfloat16)
    kept = kept_bytes(layer, lambda: layer(
        hidden, attention_mask=None, position_ids=torch.arange(positions)[None], position_embeddings=(turns, turns),
        cu_seq_lens_q=torch.tensor([0, positions], dtype=torch.int32), max_length_q=positions,
    ))  # fmt: skip
    counted = text_layer(shapes().text, BF16, trained=is_trained, lean=lean) * positions
    assert counted == pytest.approx(kept, rel=WITHIN)
    if lean:
        assert kept / positions / 1024 <= (133 if is_trained else 95)


def test_a_layer_with_shared_key_heads(fused: None) -> None:
    from transformers import MistralConfig
    from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

    sizes = {
        "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 128,
    }  # fmt: skip
    positions, config = 64, MistralConfig(**sizes, attn_implementation=attention.TEXT_ATTENTION)
    layer = on_cpu(lambda: MistralDecoderLayer(config, 0), True)
    make_lean(layer)
    hidden, turns = an_activation(1, positions, 512), torch.ones(1, positions, 128, dtype=torch.bfloat16)
    kept = kept_bytes(layer, lambda: layer(
        hidden, attention_mask=None, position_ids=torch.arange(positions)[None], position_embeddings=(turns, turns),
        cu_seq_lens_q=torch.tensor([0, positions], dtype=torch.int32), max_length_q=positions,
    ))  # fmt: skip
    text = shapes(text={"model_type": "mistral", **sizes}).text
    assert text_layer(text, BF16, trained=True, lean=True) * positions == pytest.approx(kept, rel=WITHIN)


def test_a_trained_block_of_clip_l(fused: None) -> None:
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    config = CLIPVisionConfig(**CLIP_L, attn_implementation=VISION_ATTENTION)
    block = on_cpu(lambda: CLIPEncoderLayer(config), True)
    tokens = an_activation(1, 577, 1024)
    kept = kept_bytes(block, lambda: block(tokens, attention_mask=None))
    assert vision_layer(shapes().vision, BF16) * 577 == pytest.approx(kept, rel=WITHIN)


@pytest.mark.parametrize(
    ("selector", "config"),
    [
        (ANCHOR, ANCHOR_FORMER), (ANCHOR, AnchorFormerConnectorConfig(fold_kv=True)),
        (ANCHOR, AnchorFormerConnectorConfig(width=512)), (ANCHOR, ResamplerConfig()),
        (ANCHOR, FlamingoResamplerConfig()), (ANCHOR, HoneybeeResamplerConfig()), (ANCHOR, MqtResamplerConfig()),
        (ANCHOR, CAbstractorConfig()), (ANCHOR, CAbstractorConfig(positions=576)), (ANCHOR, QFormerConfig()),
        (ALL, MlpConfig()), (ALL, IdentityConfig()),
    ],
    ids=[
        "anchor_former", "folded", "narrow", "resampler", "flamingo", "honeybee", "mqt", "c_abstractor",
        "c_abstractor_honeybee", "qformer", "mlp", "identity",
    ],
)  # fmt: skip
def test_a_connector_of_true_size(fused: None, selector: Any, config: Any) -> None:
    size = shapes(selector, config)
    module = on_cpu(lambda: config.build(1024, 4096), True).eval()  # what dropout keeps is left out

    def forward(images: int) -> Tensor:
        media = torch.ones(images, 577, 1024, dtype=torch.bfloat16)
        queries = media[:, 1:] if selector is ALL else media[:, :145].clone()
        return module(Anchors(queries, None), VisionFeatures(media, None, True))

    kept = kept_bytes(module, lambda: forward(2)) - kept_bytes(module, lambda: forward(1))  # the rest is kept once
    assert size.connector.kept(BF16) == pytest.approx(kept, rel=WITHIN)
    assert size.parameters[Part.connector] == sum(value.numel() for value in module.parameters())
    # The kernel that attention has on CPU is one that torch does not count by itself.
    on_cpu_too = {ATTENTION_ON_CPU: lambda query, key, value, **_: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=on_cpu_too) as counter:
        forward(1)
    assert size.connector.flops == pytest.approx(counter.get_total_flops(), rel=0.005)


PUBLISHED = [
    ("anchors", 1, 22.0),
    ("anchors", 4, 33.0),
    ("anchors", 9, 50.8),
    ("all patches", 1, 31.2),
    ("all patches", 4, 71.6),
]
"""GB of training memory at batch 4, by tiles of 336 pixels per image. Source: the table of AnchorFormer, arXiv
2405.18405; the ninth point, all patches of nine tiles, is given as out of memory."""


READINGS = {
    "stage 1, ZeRO-2": ({Part.connector}, 2, (0.83, 0.91)),
    "stage 2, ZeRO-3 over 8 ranks": ({Part.connector, Part.language_model}, 3, (1.06, 1.12)),
}
"""What the table may have measured, which it does not say: trained parts, ZeRO stage, and where the model lies, as
docs/plan.md says. Both are within the 20 % that the plan promises.

As stage 1 it lies below, by a share that grows with the positions: it does not know what the transformers of that time
kept beside (fp32 copies of the attention's softmax) and what the allocator cannot use. As stage 2 it lies above: here
gradients are summed in fp32, and all positions count as targets.
"""


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(("method", "tiles", "published"), PUBLISHED)
def test_the_published_points(method: str, tiles: int, published: float, reading: str) -> None:
    """Without checkpointing, as transformers writes it, all logits, 40 text positions per image."""
    trains, zero, (least, most) = READINGS[reading]
    size = shapes() if method == "anchors" else shapes(ALL, MlpConfig())
    positions = 4 * (tiles * size.connector.queries + 40)
    layout = Layout(
        ranks=8, zero=zero, value_bytes=BF16, checkpointing=False, bucket=200_000_000, buckets=1, lean=False
    )  # fmt: skip
    batch = MicroBatch(positions=positions, supervised=positions, images=4 * tiles)
    counted = rank_memory(size, trains, layout, batch).total / 1e9
    assert least * published < counted < most * published
