"""The values that keys of a run may have where there are only so many; imports no torch."""

from enum import Enum


class StageName(str, Enum):
    align = "align"
    finetune = "finetune"


class Part(str, Enum):
    """The parts of the model that a stage can train, by the attribute that holds them."""

    vision_tower = "vision_tower"
    connector = "connector"
    integration = "integration"
    """Of models that have one."""
    language_model = "language_model"


class Schedule(str, Enum):
    cosine = "cosine"
    constant = "constant"


class EngineName(str, Enum):
    deepspeed = "deepspeed"
    plain = "plain"


class Checkpointing(str, Enum):
    """Whether the language model's layers are computed a second time in backward instead of being kept."""

    auto = "auto"
    """Only where the memory of the card makes it necessary (`train.plan`)."""
    on = "on"
    off = "off"


class Kernels(str, Enum):
    """Which form of the fused operations runs."""

    auto = "auto"
    """Triton on CUDA, PyTorch elsewhere; the reason is logged."""
    torch = "torch"
    triton = "triton"


class Repro(str, Enum):
    """How far two runs of one config on one machine agree."""

    fast = "fast"
    """To the bit on CPU; on CUDA some backward passes add in an order that changes from run to run."""
    strict = "strict"
    """To the bit on CUDA too; an operation without a deterministic form ends the run, by name."""
