"""The sharded engine: DeepSpeed ZeRO 0 to 3 behind the same interface, and all that has to be known about it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from anchorformer.contracts import Batch
from anchorformer.errors import UserError
from train.choices import Part
from train.config import RunConfig
from train.distributed import World
from train.engine.base import Engine
from train.engine.files import Files
from train.engine.partition import Partition
from train.loss import supervised_loss
from train.optim import build_optimizer, build_scheduler, part_of_parameter
from train.run.fingerprint import Piece
from train.stage import assert_declared, trained_state
from train.zero import Offload

log = logging.getLogger(__name__)


class ZeroEngine(Engine):
    """DeepSpeed with our own AdamW, schedule and accumulation borders.

    DeepSpeed averages gradients over the ranks; the loss is multiplied by their number so that they are summed instead.
    """

    def __init__(self, model: nn.Module, config: RunConfig, world: World, total_steps: int, dtype: torch.dtype) -> None:
        super().__init__(config, world)
        check_device(config, world, dtype)
        deepspeed = _import_deepspeed(world.device)
        self._owners = part_of_parameter(model, config.stage)
        optimizer = build_optimizer(model, config.stage, world.device)
        scheduler = build_scheduler(optimizer, config.stage, total_steps)
        optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._deepspeed, _, _, self.scheduler = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, config=deepspeed_config(config, world, dtype)
        )
        self._files = Files()
        self._deepspeed.checkpoint_engine.save = self._files.save
        self._deepspeed.checkpoint_engine.load = self._files.load
        # DeepSpeed would leave programs beside the checkpoints, which unpickle whatever lies there.
        self._deepspeed._copy_recovery_script = lambda _: None
        self.model = self._deepspeed.module
        self._stage = config.zero.stage
        self._partition = Partition(self._deepspeed, self._stage, world.rank)
        assert_declared(self.model, config.stage, optimized)

    def _backward(self, batch: Batch, step_supervised: int, *, is_last: bool) -> Tensor:
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        with record_function("forward"):
            loss = supervised_loss(self._deepspeed, batch, step_supervised)
        with record_function("backward"):
            self._deepspeed.backward(loss * self.world.size, scale_wrt_gas=False)
        return loss.detach()

    def _gradients(self) -> Iterator[tuple[Part, Tensor]]:
        optimizer = self._deepspeed.optimizer
        if self._stage == 0:
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    yield self._owners[id(parameter)], parameter.grad
            return
        groups = optimizer.fp16_groups if self._stage == 3 else optimizer.bit16_groups
        if self.config.zero.offload_optimizer is not Offload.none:
            # The gradients themselves are on their way to the host; DeepSpeed has taken their norms before.
            for parameter in (member for members in groups for member in members):
                norm = optimizer.norm_for_param_grads.get(optimizer.get_param_id(parameter))
                if norm is not None:
                    yield self._owners[id(parameter)], norm.float()
            return
        for index, members in enumerate(groups):
            for gradient in optimizer.averaged_gradients[index]:
                yield self._owners[id(members[0])], gradient

    def step(self) -> None:
        self._deepspeed.step()

    @property
    def _param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._deepspeed.basic_optimizer.param_groups
        return groups

    def _pieces(self, parameters: Mapping[str, nn.Parameter], moment: str | None = None) -> dict[str, Piece]:
        return self._partition.pieces(parameters, moment)

    def _keep(self, pieces: Mapping[str, Piece], moment: str | None) -> None:
        self._partition.keep(self._trained(), pieces, moment)

    def _step_counts(self) -> list[Tensor]:
        return self._partition.step_counts()

    def _publish(self) -> None:
        self._partition.publish()

    def gather(self, part: Part) -> dict[str, Tensor] | None:
        tensors = trained_state(self.model, self.config.stage, part)
        if self._stage == 3:
            from deepspeed.runtime.zero import GatheredParameters

            parameters = dict(self.model.named_parameters())
            for name in tensors:
                if name in parameters:
                    # One at a time: rank 0 never holds more than the part, other ranks never more than one tensor.
                    with GatheredParameters([parameters[name]]):
                        tensors[name] = parameters[name].detach().cpu().clone() if self.world.is_main else tensors[name]
        if not self.world.is_main:
            return None
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    def _save_shards(self, folder: Path) -> list[Path]:
        self._files.begin()
        self._deepspeed.save_checkpoint(
            str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=True
        )
        self.world.settle(self._files.problem)
        return list(self._files.written)

    def _load_shards(self, folder: Path) -> None:
        if self.config.zero.uses_nvme:
            raise UserError(
                "shards cannot be read into what lies on NVMe", found=f"{folder}, {', '.join(self.config.zero.extras)}",
                expected="a checkpoint that was written with state on NVMe, which is whole",
                remedy="resume with zero=zero3_offload, or with the zero that the checkpoint was written with",
            )  # fmt: skip
        # Frozen weights are not in the checkpoint, so DeepSpeed cannot be strict here; the caller compares the
        # fingerprint of every tensor instead, which is stricter than names.
        path, _ = self._deepspeed.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=False)
        if path is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {folder}")


def check_device(config: RunConfig, world: World, dtype: torch.dtype) -> None:
    """What `train.zero` cannot know before the ranks know their devices.

    Raises:
        UserError: quantized messages on CPU, gradients in 4 bits where not every card of a node has a rank, weights of
            fp32 on NVMe.
    """
    zero = config.zero
    if zero.offload_parameters is Offload.nvme and dtype == torch.float32:
        raise UserError(
            "DeepSpeed reads weights of fp32 back from NVMe as other numbers", found="fp32, offload_parameters nvme",
            expected="hardware.precision=bf16, or weights elsewhere",
            remedy="set hardware.precision=bf16 or zero.offload_parameters=cpu",
        )  # fmt: skip
    if (zero.qwz or zero.qgz) and world.device.type != "cuda":
        raise UserError(
            "DeepSpeed has kernels for 8 and 4 bits on CUDA only", found=f"{', '.join(zero.extras)} on {world.device}",
            expected="hardware.device=cuda", remedy="set zero=zero3",
        )  # fmt: skip
    if zero.qgz and torch.cuda.device_count() != config.hardware.ranks:
        raise UserError(
            "qgZ takes every card that it sees for a rank of the node, and would add up other ranks' gradients",
            found=f"{torch.cuda.device_count()} cards, {config.hardware.ranks} ranks per node",
            expected="as many ranks as cards", remedy="set CUDA_VISIBLE_DEVICES or hardware.ranks",
        )  # fmt: skip


def deepspeed_config(config: RunConfig, world: World, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration of a run."""
    is_cuda = world.device.type == "cuda"
    zero = config.zero
    stage: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": zero.bucket_size,
        "allgather_bucket_size": zero.bucket_size,
        "overlap_comm": zero.overlap_comm and is_cuda,
        "contiguous_gradients": True,
        "zero_hpz_partition_size": config.hardware.ranks if zero.hpz else 1,
        "zero_quantized_weights": zero.qwz,
        "zero_quantized_gradients": zero.qgz,
    }
    for name, place in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_parameters)):
        if place is not Offload.none:
            stage[name] = {"device": place.value, "pin_memory": is_cuda}
            if place is Offload.nvme:
                # DeepSpeed names files by rank alone, and another run may use the same disk.
                stage[name]["nvme_path"] = f"{zero.nvme_path}/{config.digest[:16]}"
    if config.zero.overlap_comm and not is_cuda:
        log.info("zero.overlap_comm has no effect on %s, which has no streams to overlap on", world.device)
    micro = config.hardware.micro_batch
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        # The planned number; the true borders are set micro-batch by micro-batch.
        "gradient_accumulation_steps": math.ceil(config.stage.global_batch / (micro * world.size)),
        "gradient_clipping": config.stage.clip_norm,
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
        # An offloaded step, too, is taken by torch's AdamW: DeepSpeed's own for CPU is compiled on each machine.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "wall_clock_breakdown": False,
    }
    if dtype == torch.bfloat16 and zero.stage < 3 and zero.offload_optimizer is not Offload.none:
        log.info("the sums of a step's micro-batches wait on the host in bf16; under ZeRO-3 they would in fp32")
    if dtype == torch.bfloat16 and config.zero.stage >= 2:
        # Micro-batches are summed in fp32, at 4 bytes per value of this rank's part. DeepSpeed has no such mix for
        # stage 0, and would replace stage 1's optimizer by another class.
        own["data_types"] = {"grad_accum_dtype": "fp32"}
    return own


@contextmanager
def partitioned_loading(config: RunConfig, world: World, dtype: torch.dtype) -> Iterator[None]:
    """`from_pretrained` inside this block leaves each rank with its ZeRO-3 part of every tensor, never the whole."""
    from transformers.integrations import HfDeepSpeedConfig

    _import_deepspeed(world.device)
    # transformers looks for a living object of this class; the name keeps it alive until the block ends.
    alive = HfDeepSpeedConfig(deepspeed_config(config, world, dtype))
    try:
        yield
    finally:
        del alive


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told what it would otherwise find out by compiling: on CPU it needs no compiler at all."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # DeepSpeed builds a shared-memory extension while joining the process group and aborts without g++ and ninja.
        # The name is private to 0.19, the pinned series; a test with an empty PATH watches it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
