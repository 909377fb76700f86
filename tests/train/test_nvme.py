"""Optimizer and weights in files: the same steps and the same state.

Asked for by ANCHORFORMER_NVME, a folder on the disk; DeepSpeed compiles its access to it, with libaio's header, g++ and
ninja (apt-get install libaio-dev g++ ninja-build), which takes minutes. Not run through yet.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train import test_offload as offload
from tests.train.ranks import Ranks
from train.distributed import World, alone

EXTENSIONS = Path(__file__).parents[2] / ".cache" / "torch_extensions"
LEAST = 1024
"""Bytes of a tensor that is swapped here; DeepSpeed leaves less than a megabyte in memory."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "ANCHORFORMER_NVME" not in os.environ, reason="ANCHORFORMER_NVME=<folder on a disk> asks for it"
    ),
]
PLACES: dict[str, dict[str, Any]] = {
    "optimizer": {"stage": 3, "offload_optimizer": "nvme"},
    "both": {"stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme"},
    "parameters": {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "nvme"},
}


def swapping(path: str) -> None:
    """Makes tiny tensors worth swapping, in a rank that may compile."""
    from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper

    from train.engine import zero as door

    os.environ |= {"PATH": path, "TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}
    optimizer_utils.MIN_AIO_BYTES = partitioned_param_swapper.MIN_AIO_BYTES = LEAST
    if getattr(door.deepspeed_config, "is_patched", False):
        return
    own = door.deepspeed_config

    def small(*args: Any) -> dict[str, Any]:
        made = own(*args)
        made["aio"] = {"block_size": LEAST}
        made["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
        return made

    small.is_patched = True  # type: ignore[attr-defined]
    door.deepspeed_config = small


def three_steps(world: World, folder: str, zero: dict[str, Any], path: str) -> Any:
    swapping(path)
    return offload.three_steps(world, folder, zero, offload.HALVES)


def save_and_load(world: World, folder: str, out: str, zero: dict[str, Any], path: str) -> Any:
    swapping(path)
    return offload.save_and_load(world, folder, out, zero)


@pytest.fixture(scope="module")
def swappers() -> Any:
    compiled = {**os.environ, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}
    program = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"
    subprocess.run([sys.executable, "-c", program], env=compiled, check=True, capture_output=True)
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("name", PLACES)
def test_steps_from_files_agree_and_survive(swappers: Ranks, tiny_folder: Path, tmp_path: Path, name: str) -> None:
    disk = Path(os.environ["ANCHORFORMER_NVME"]) / tmp_path.name
    zero = PLACES[name] | {"nvme_path": str(disk)}
    given = {"folder": str(tiny_folder), "zero": zero, "path": os.environ["PATH"]}
    (taken, weights), _ = swappers.run(three_steps, **given)
    expected, expected_weights = offload.three_steps(alone(), str(tiny_folder), {}, offload.ALL)
    for (loss, norms), (right, right_norms) in zip(taken, expected, strict=True):
        assert loss == pytest.approx(right, rel=1e-5)
        assert norms == pytest.approx(right_norms, rel=1e-4)
    for key, value in weights.items():
        assert value.sub(expected_weights[key]).abs().max() <= 2e-6, key
    assert set(weights) == set(expected_weights)
    assert list(disk.rglob("*.swp")), "something was swapped"

    for told, read in swappers.run(save_and_load, out=str(tmp_path), **given):
        assert told == read
