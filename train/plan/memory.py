"""The bytes that one rank needs, by what they hold: counted from sizes; the tests compare with measured tensors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields

from train.choices import Part
from train.config import LoraConfig
from train.plan.adapter import NF4, adapter_kept, adapter_values
from train.plan.connectors import FP32
from train.plan.shapes import Shapes, TextShape, VisionShape
from train.zero import Offload

MASTER_AND_MOMENTS = 12
"""Bytes per trained value: fp32 weight and AdamW's two moments."""
ZERO3_REUSE = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance: parameters that the pass needs again within so many are not given back."""
ZERO3_PREFETCH = 50_000_000
"""DeepSpeed's stage3_prefetch_bucket_size, in parameters."""
SUBGROUP, SWAP_BUFFERS = 1_000_000_000, 4
"""DeepSpeed's sub_group_size, in values, which it swaps at a time, and the buffers it does that with."""
LOSS_CHUNK = 2 * 2**26
"""Cross-entropy (`anchorformer.kernels.cross_entropy`) takes 64 MiB of fp32 logits at a time, and their exponential."""
CONTEXT = 1_500_000_000
"""CUDA context, NCCL's buffers and the libraries' workspaces. Assumed, not counted; torch's own peak leaves it out."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a rank holds the model's state.

    Attributes:
        ranks: over all nodes.
        zero: ZeRO stage; 0 also stands for the plain engine.
        value_bytes: of a weight or activation: 2 in bf16, 4 in fp32.
        checkpointing: whether the language model's layers are computed again in backward.
        bucket: elements of a gradient bucket.
        buckets: how many of them there are; two where reduction overlaps with backward.
        node_ranks: of one node.
        optimizer, parameters: where they are offloaded to.
        hpz: whether each node keeps all weights once more.
        lean: whether norms, gates and cross-entropy keep as little as `anchorformer.lean` makes them keep.
    """

    ranks: int
    zero: int
    value_bytes: int
    checkpointing: bool
    bucket: int
    buckets: int
    node_ranks: int = 1
    optimizer: Offload = Offload.none
    parameters: Offload = Offload.none
    hpz: bool = False
    lean: bool = True


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward sees.

    Attributes:
        positions: of the language model, anchors counted.
        supervised: positions whose logits are computed.
        images: tiles.
    """

    positions: int
    supervised: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank at its fullest moment: the end of a forward, when the logits' gradient is taken.

    Attributes:
        weights: all parts, in the dtype they compute in; under ZeRO-3 this rank's share and the layers in use.
        optimizer: this rank's fp32 weights and moments.
        gradients: sums of this rank and buckets of those under way.
        activations: kept for backward.
        logits: logits of the supervised positions and their gradient, or the gradients inside the last layer, whichever
            is more.
        context: what is not torch's.
    """

    weights: float
    optimizer: float
    gradients: float
    activations: float
    logits: float
    context: float = CONTEXT

    @property
    def allocated(self) -> float:
        """What `torch.cuda.max_memory_allocated` should say."""
        return self.total - self.context

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))


def rank_memory(
    shapes: Shapes, trains: Collection[Part], layout: Layout, batch: MicroBatch, lora: LoraConfig | None = None
) -> Memory:
    """The fullest moment of a step of one rank with this micro-batch.

    Args:
        trains: parts whose own weights are trained.
        lora: adapter of the language model that is trained as well.

    Raises:
        UserError: an adapted layer whose shape is not written down here.
    """
    total, trained = value_counts(shapes, trains, lora)
    weights, optimizer, gradients = _state(shapes.text, layout, total, trained)
    if lora and lora.quantize:
        weights -= (layout.value_bytes - NF4) * shapes.text.layers * shapes.text.matrices
    kept, transient = _activations(shapes, trains, layout, batch, lora)
    return Memory(
        weights=weights, optimizer=optimizer, gradients=gradients, activations=kept,
        logits=max(transient, _logits(shapes.text, layout, batch)),
    )  # fmt: skip


def value_counts(shapes: Shapes, trains: Collection[Part], lora: LoraConfig | None) -> tuple[int, int]:
    """All values of a model with its adapter, and those of them that are trained.

    Raises:
        UserError: see `rank_memory`.
    """
    counts = shapes.parameters
    adapter = adapter_values(shapes.text, lora) if lora else 0
    return sum(counts.values()) + adapter, sum(counts[part] for part in trains) + adapter


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes of one rank off its card.

    Attributes:
        memory: of the host.
        disk: on NVMe.
    """

    memory: float
    disk: float


def host_memory(shapes: Shapes, trains: Collection[Part], layout: Layout, lora: LoraConfig | None = None) -> HostMemory:
    """What offloading keeps of a rank elsewhere; page-locked, but for the files.

    Raises:
        UserError: see `rank_memory`.
    """
    total, trained = value_counts(shapes, trains, lora)
    size, mine, memory, disk = layout.value_bytes, trained / layout.ranks, 0.0, 0.0
    if layout.optimizer is Offload.cpu:
        # Weights, moments and gradient in fp32; below stage 3 also what the step sums up and what it sends back.
        memory += (MASTER_AND_MOMENTS + FP32 + (2 * size if layout.zero < 3 else size)) * mine
    elif layout.optimizer is Offload.nvme:
        disk += (MASTER_AND_MOMENTS + FP32) * mine
        memory += (SWAP_BUFFERS * FP32 + FP32) * min(mine, SUBGROUP)
    if layout.parameters is Offload.cpu:
        memory += size * total / layout.ranks
    elif layout.parameters is Offload.nvme:
        disk += size * total / layout.ranks
        memory += size * min(total / layout.ranks, ZERO3_REUSE)
    return HostMemory(memory=memory, disk=disk)


def _state(text: TextShape, layout: Layout, total: int, trained: int) -> tuple[float, float, float]:
    """Weights, optimizer and gradients, as `train.engine` makes DeepSpeed hold them."""
    size, mine = layout.value_bytes, trained / layout.ranks
    weights: float = size * total
    if layout.zero == 3:
        # At the turn from forward to backward the way to a parameter and back again is within the distance for half of
        # it. Besides: the layer being computed, and the one being fetched.
        live = ZERO3_REUSE / 2 + text.matrices + ZERO3_PREFETCH
        shard = weights / layout.ranks if layout.parameters is Offload.none else 0.0
        copy = weights / layout.node_ranks if layout.hpz else 0.0
        weights = shard + copy + size * min(live, total)
    if layout.zero == 0:
        # In fp32 the weights themselves are what the optimizer updates.
        optimizer: float = (MASTER_AND_MOMENTS if size < FP32 else MASTER_AND_MOMENTS - FP32) * trained
        gradients: float = (size + FP32) * trained if size < FP32 else size * trained
    else:
        is_offloaded = layout.optimizer is not Offload.none
        optimizer = 0.0 if is_offloaded else MASTER_AND_MOMENTS * mine
        sums = 0.0 if is_offloaded and layout.zero >= 2 else FP32 * mine if layout.zero >= 2 else size * trained
        # Below stage 3 the sums come back from the host one tensor at a time.
        window = size * text.vocabulary * text.width if is_offloaded and layout.zero < 3 else 0
        gradients = sums + layout.buckets * layout.bucket * size + window
    return weights, optimizer, gradients


def _activations(
    shapes: Shapes, trains: Collection[Part], layout: Layout, batch: MicroBatch, lora: LoraConfig | None
) -> tuple[float, float]:  # fmt: skip
    """What is kept for backward, and the gradients at work inside one layer of the language model."""
    size, text, vision = layout.value_bytes, shapes.text, shapes.vision
    layer = text_layer(text, size, trained=Part.language_model in trains, lean=layout.lean) * batch.positions
    layer += adapter_kept(text, lora, size) * batch.positions if lora else 0
    entrance = size * text.width * batch.positions
    # The last norm's input, and the supervised rows that the head reads.
    exit_ = entrance if layout.lean else norm_input(text.width, size) * batch.positions
    kept = (text.layers * entrance + layer if layout.checkpointing else text.layers * layer) + exit_
    integration, views = shapes.integration, batch.images / shapes.view
    if integration is not None:
        looking = integration.kept(text, size, batch.positions, views, trained=Part.language_model in trains)
        kept += looking if layout.checkpointing else integration.layers * looking
        # What is injected, at every position, is kept once.
        kept += entrance + size * integration.values * views
    kept += size * text.width * batch.supervised
    if Part.connector in trains or Part.vision_tower in trains:
        kept += shapes.connector.kept(size) * batch.images / shapes.view
    if Part.vision_tower in trains:
        kept += vision.layers * vision_layer(vision, size) * vision.attended * batch.images
    at_work = size * (4 * text.inner + 2 * text.width) * batch.positions
    return kept, at_work


def _logits(text: TextShape, layout: Layout, batch: MicroBatch) -> float:
    logits = text.vocabulary * batch.supervised
    if layout.lean:
        return 2 * layout.value_bytes * logits + min(LOSS_CHUNK, 2 * FP32 * logits)
    # The log-probabilities, the gradient of the sum and that of the logits, all in fp32, and the logits' own.
    return (3 * FP32 + layout.value_bytes) * logits


# What one layer keeps for backward. Weights are no part of it; a tensor that two operations keep counts once.


def text_layer(text: TextShape, size: int, *, trained: bool, lean: bool) -> float:
    """Bytes per position of one layer of a Llama-like language model with fused attention.

    | kept by | lean | as transformers writes it | more where weights are trained |
    |---|---|---|---|
    | both norms | input and 1 / rms | input in fp32 and 1 / rms | the input of the matrices behind it; as written also the normed value |
    | attention | queries, keys, values, output and the fp32 logsumexp | the same | |
    | gated feed-forward | gate and up | gate, up and silu(gate) | the input of the last matrix |
    """  # noqa: E501
    norms = 2 * (size * text.width if lean else norm_input(text.width, size)) + 2 * FP32
    attention = size * (2 * text.query + 2 * text.key) + FP32 * text.heads
    gates = size * text.inner * (2 if lean else 3)
    inputs = size * (2 * text.width * (1 if lean else 2) + text.inner)
    return norms + attention + gates + (inputs if trained else 0)


def norm_input(width: int, size: int) -> float:
    """Bytes per position that transformers' RMSNorm keeps of its input: an fp32 copy, or in fp32 the input itself."""
    return max(size, FP32) * width


def vision_layer(vision: VisionShape, size: int) -> float:
    """Bytes per token of one trained block with fused attention: two norms, attention, two matrices.

    Each norm keeps its input and its output, the attention queries, keys, values, output and logsumexp, the
    feed-forward its first product and the activated one; quick_gelu keeps a sigmoid besides, DINOv2 what its two scales
    multiply.
    """
    hidden = 3 if vision.activation == "quick_gelu" else 2
    width = 8 + 2 * vision.scales_layers
    return size * (width * vision.width + hidden * vision.inner) + FP32 * (vision.heads + 4)
