"""What DeepSpeed ZeRO shards and where it keeps it, and which of that goes together; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from anchorformer.errors import UserError
from anchorformer.schema import Schema
from data.config import Count


class Offload(str, Enum):
    """Where a rank's share lies between its uses."""

    none = "none"
    """On the card."""
    cpu = "cpu"
    """In the host's memory."""
    nvme = "nvme"
    """In files below `nvme_path`."""


@dataclass(frozen=True, kw_only=True)
class ZeroConfig(Schema):
    """DeepSpeed ZeRO: what is sharded over the ranks, where it lies, and what of it travels between nodes."""

    stage: int = 2
    """0 shards nothing, 1 the optimizer state, 2 the gradients too, 3 the weights too."""
    overlap_comm: bool = True
    """Gradients travel while backward still computes."""
    bucket_size: Count = 200_000_000
    """Elements per reduce bucket."""
    offload_optimizer: Offload = Offload.none
    """Weights in fp32, their moments and gradients, and the step itself, which is then taken by the host's cores."""
    offload_parameters: Offload = Offload.none
    """Shards of the weights that compute; stage 3."""
    nvme_path: str | None = None
    """Folder on a disk of each node, for `nvme`."""
    hpz: bool = False
    """A second copy of the weights, sharded over each node alone, so that backward gathers without the network: hpZ of
    ZeRO++ (Wang et al., arXiv 2306.10209); stage 3."""
    qwz: bool = False
    """Weights are gathered in 8 bits: qwZ; stage 3, CUDA. Changes numbers."""
    qgz: bool = False
    """Gradients are reduced in 4 bits, within a node and then between nodes: qgZ; stage 3, CUDA. Changes numbers."""

    @property
    def extras(self) -> list[str]:
        """What is asked for beyond a stage, as it is written on the command line."""
        offloads = [f"zero.{name}={place.value}" for name, place in self._offloads.items() if place is not Offload.none]
        return offloads + [f"zero.{name}=true" for name in ("hpz", "qwz", "qgz") if getattr(self, name)]

    @property
    def _offloads(self) -> dict[str, Offload]:
        return {"offload_optimizer": self.offload_optimizer, "offload_parameters": self.offload_parameters}

    @property
    def uses_nvme(self) -> bool:
        return Offload.nvme in self._offloads.values()


def check_zero(zero: ZeroConfig, *, ranks_per_node: int, nodes: int, by_deepspeed: bool, on_cpu: bool) -> None:
    """What DeepSpeed refuses, or silently does otherwise, is refused here.

    Args:
        by_deepspeed: whether the run's engine is DeepSpeed.
        on_cpu: whether the ranks compute on CPU, as far as the config says.

    Raises:
        UserError: an unknown stage; an offload or a part of ZeRO++ in a stage, engine, device or cluster that has no
            use for it; NVMe without a folder, or a folder without NVMe.
    """
    if zero.stage not in (0, 1, 2, 3):
        raise UserError("zero.stage is unknown", found=zero.stage, expected="0, 1, 2 or 3", remedy="e.g. zero=zero2")
    if zero.extras and not by_deepspeed:
        raise _refusal(zero, "the plain engine shards and offloads nothing", "engine=deepspeed", "set engine=deepspeed")
    if zero.offload_optimizer is Offload.cpu and zero.stage == 0:
        raise _refusal(zero, "stage 0 has no optimizer state of its own to offload", "zero.stage=1, 2 or 3",
                       "set zero=zero2_offload")  # fmt: skip
    if zero.offload_optimizer is Offload.nvme and zero.stage < 3:
        raise _refusal(zero, "below stage 3 DeepSpeed keeps in the host's memory what was to go to NVMe",
                       "zero.stage=3, or zero.offload_optimizer=cpu",
                       "set zero=zero3_nvme or zero=zero2_offload")  # fmt: skip
    if zero.offload_parameters is not Offload.none and zero.stage < 3:
        raise _refusal(zero, "below stage 3 every card needs all weights, and DeepSpeed would leave them there",
                       "zero.stage=3", "set zero=zero3_offload")  # fmt: skip
    if zero.uses_nvme != (zero.nvme_path is not None):
        raise UserError(
            "offloading to NVMe is half described",
            found=f"zero.nvme_path={zero.nvme_path}, {', '.join(zero.extras) or 'no offload'}",
            expected="nvme and a folder for it, or neither",
            remedy="add zero.nvme_path=<folder on a disk of each node>" if zero.uses_nvme else "drop zero.nvme_path",
        )  # fmt: skip
    if (zero.hpz or zero.qwz or zero.qgz) and zero.stage < 3:
        raise _refusal(zero, "ZeRO++ is about the weights that stage 3 shards", "zero.stage=3", "set zero=zero3_hpz")
    if (zero.hpz or zero.qgz) and (nodes == 1 or ranks_per_node == 1):
        raise _refusal(zero, "hpZ and qgZ trade links within a node for the network between nodes, and there is only "
                       f"one of the two: {nodes} node(s) of {ranks_per_node} rank(s)", "several nodes of several ranks",
                       "drop them, or set zero=zero3")  # fmt: skip
    if zero.hpz and zero.offload_parameters is not Offload.none:
        raise _refusal(zero, "hpZ's copy would lie off the card too, behind a link slower than the network it saves",
                       "one of the two", "set zero=zero3_hpz or zero=zero3_offload")  # fmt: skip
    if (zero.qwz or zero.qgz) and on_cpu:
        raise _refusal(zero, "DeepSpeed has kernels for 8 and 4 bits on CUDA only", "hardware.device=cuda",
                       "set zero=zero3")  # fmt: skip


def _refusal(zero: ZeroConfig, what: str, expected: str, remedy: str) -> UserError:
    return UserError(what, found=f"zero.stage={zero.stage}, {', '.join(zero.extras)}", expected=expected, remedy=remedy)
