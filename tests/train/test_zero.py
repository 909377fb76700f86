"""What of ZeRO goes together, and that it reaches DeepSpeed's own configuration."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from anchorformer.errors import UserError
from train.compose import compose
from train.config import RunConfig
from train.zero import Offload, ZeroConfig

NODES = "hardware=a100x8_2nodes"


def composed(*overrides: str) -> RunConfig:
    return compose(["stage=align", "experiment=paper_7b", "data.root=/d", *overrides])


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["zero.stage=4"], "zero.stage is unknown"),
        (["zero=zero0", "zero.offload_optimizer=cpu"], "stage 0 has no optimizer state"),
        (["zero=zero2", "zero.offload_optimizer=nvme", "zero.nvme_path=/n"], "host's memory what was to go to NVMe"),
        (["zero=zero2", "zero.offload_parameters=cpu"], "below stage 3 every card needs all weights"),
        (["zero=zero3_nvme"], "half described"),
        (["zero=zero3", "zero.nvme_path=/n"], "half described"),
        (["zero=zero2", "zero.hpz=true", NODES], "that stage 3 shards"),
        (["zero=zero2", "zero.qwz=true"], "that stage 3 shards"),
        (["zero=zero3_hpz"], r"1 node\(s\) of 8 rank"),
        (["zero=zero3", "zero.qgz=true", NODES, "hardware.ranks=1"], r"2 node\(s\) of 1 rank"),
        (["zero=zero3_hpz", "zero.offload_parameters=cpu", NODES], "slower than the network"),
        (["zero=zero3_plus", NODES, "hardware.device=cpu"], "on CUDA only"),
        (["engine=plain", "zero=zero2_offload", "hardware=one_gpu"], "the plain engine"),
    ],
)
def test_what_deepspeed_would_refuse_or_ignore_is_refused(overrides: list[str], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        composed(*overrides)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "overrides",
    [
        ["zero=zero1", "zero.offload_optimizer=cpu"], ["zero=zero2_offload"], ["zero=zero3_offload"],
        ["zero=zero3_nvme", "zero.nvme_path=/n"], ["zero=zero3_hpz", NODES], ["zero=zero3_plus", NODES],
    ],
)  # fmt: skip
def test_every_remedy_and_preset_is_accepted(overrides: list[str]) -> None:
    assert composed(*overrides).zero.extras


def test_refused_before_torch_is_imported() -> None:
    program = (
        "import sys\nfrom anchorformer.errors import UserError\nfrom train.compose import compose\n"
        "try: compose(['stage=align', 'data.root=/d', 'zero=zero3_hpz'])\n"
        "except UserError as error: print(error.what)\n"
        "print([name for name in ('torch', 'deepspeed') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "hpZ" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_extras_are_what_is_typed() -> None:
    zero = ZeroConfig(stage=3, offload_optimizer=Offload.cpu, qwz=True)
    assert zero.extras == ["zero.offload_optimizer=cpu", "zero.qwz=true"]
    assert not ZeroConfig().extras


@pytest.mark.parametrize("preset", ["zero2_offload", "zero3_offload", "zero3_nvme", "zero3_hpz", "zero3_plus"])
def test_deepspeed_reads_what_a_preset_says(preset: str) -> None:
    import torch
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from train.distributed import World
    from train.engine.zero import deepspeed_config

    more = ["zero.nvme_path=/n"] if "nvme" in preset else []
    config = composed(f"zero={preset}", *more, NODES)
    own = deepspeed_config(config, World(rank=0, size=16, device=torch.device("cuda")), torch.bfloat16)
    zero: Any = DeepSpeedZeroConfig(**own["zero_optimization"])
    places = (zero.offload_optimizer, zero.offload_param)
    expected = (config.zero.offload_optimizer, config.zero.offload_parameters)
    assert [place.device if place else "none" for place in places] == [place.value for place in expected]
    assert all(place is None or place.pin_memory for place in places)
    if "nvme" in preset:
        assert {str(place.nvme_path) for place in places} == {f"/n/{config.digest[:16]}"}, "a folder of the run's own"
    assert zero.zero_hpz_partition_size == (8 if config.zero.hpz else 1)
    assert (zero.zero_quantized_weights, zero.zero_quantized_gradients) == (config.zero.qwz, config.zero.qgz)
    assert own["train_micro_batch_size_per_gpu"] * own["gradient_accumulation_steps"] * 16 >= 256


def test_what_only_the_ranks_know_is_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from train.distributed import World
    from train.engine.zero import check_device

    config = composed("zero=zero3_plus", NODES)
    with pytest.raises(UserError, match="on CUDA only"):
        check_device(config, World(rank=0, size=16, device=torch.device("cpu")), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="takes every card that it sees"):
        check_device(config, World(rank=0, size=16, device=torch.device("cuda")), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    check_device(config, World(rank=0, size=16, device=torch.device("cuda")), torch.bfloat16)
    swapped = composed("zero=zero3_nvme", "zero.nvme_path=/nvme", NODES)
    with pytest.raises(UserError, match="reads weights of fp32 back from NVMe as other numbers"):
        check_device(swapped, World(rank=0, size=16, device=torch.device("cuda")), torch.float32)
    check_device(swapped, World(rank=0, size=16, device=torch.device("cuda")), torch.bfloat16)
