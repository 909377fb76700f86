"""Optimizer and weights in files: the same steps and the same state as in memory.

Asked for by ANCHORFORMER_NVME, a folder on the disk; DeepSpeed compiles its access to it, with libaio's header, g++ and
ninja (apt-get install libaio-dev g++ ninja-build), which takes minutes. DeepSpeed leaves what has less than a megabyte
in memory, so the language model is larger here than in other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorformer.assemble import assemble
from tests.conftest import ANCHOR, CONNECTOR
from tests.train import test_offload as offload
from tests.train.ranks import Ranks
from train.distributed import World

EXTENSIONS = Path(__file__).parents[2] / ".cache" / "torch_extensions"
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


def compiling(path: str) -> None:
    """A rank that may compile: other tests take its PATH away."""
    os.environ |= {"PATH": path, "TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}


def three_steps(world: World, folder: str, zero: dict[str, Any], path: str, dtype: torch.dtype) -> Any:
    compiling(path)
    return offload.three_steps(world, folder, zero, offload.HALVES, dtype)


def save_and_load(world: World, folder: str, out: str, zero: dict[str, Any], path: str) -> Any:
    compiling(path)
    return offload.save_and_load(world, folder, out, zero)


@pytest.fixture(scope="module")
def swappers() -> Any:
    compiled = {**os.environ, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}
    program = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"
    subprocess.run([sys.executable, "-c", program], env=compiled, check=True, capture_output=True)
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def folder(tiny_backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose language model has matrices of which half is more than a megabyte."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("large")
    torch.manual_seed(3)
    config = LlamaConfig.from_pretrained(
        tiny_backbones / "llama", hidden_size=512, intermediate_size=3072, num_attention_heads=8, head_dim=64
    )
    LlamaForCausalLM(config).save_pretrained(root / "llama")
    AutoTokenizer.from_pretrained(tiny_backbones / "llama").save_pretrained(root / "llama")
    clip, llama = str(tiny_backbones / "clip"), str(root / "llama")
    return str(assemble(clip, llama, ANCHOR, CONNECTOR, root / "start", template="chat"))


@pytest.mark.parametrize(
    ("name", "dtype"), [("optimizer", torch.float32), *((name, torch.bfloat16) for name in PLACES)]
)
def test_steps_from_files_are_those_in_memory(
    swappers: Ranks, folder: str, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    disk = Path(os.environ["ANCHORFORMER_NVME"]) / tmp_path.name
    given = {"folder": folder, "path": os.environ["PATH"], "dtype": dtype}
    (taken, weights), _ = swappers.run(three_steps, zero=PLACES[name] | {"nvme_path": str(disk)}, **given)
    (expected, expected_weights), _ = swappers.run(three_steps, zero={"stage": 3}, **given)
    for (loss, norms), (right, right_norms) in zip(taken, expected, strict=True):
        # Norms, by which gradients are clipped, are summed in another order.
        assert loss == pytest.approx(right, rel=1e-6)
        assert norms == pytest.approx(right_norms, rel=1e-5)
    for key, value in weights.items():
        torch.testing.assert_close(value, expected_weights[key], rtol=0, atol=1e-6, msg=key)
    assert list(disk.rglob("*.swp")), "something was swapped"


@pytest.mark.parametrize("name", PLACES)
def test_state_in_files_survives_to_the_bit(swappers: Ranks, folder: str, tmp_path: Path, name: str) -> None:
    zero = PLACES[name] | {"nvme_path": str(Path(os.environ["ANCHORFORMER_NVME"]) / tmp_path.name)}
    for told, read in swappers.run(save_and_load, folder=folder, out=str(tmp_path), zero=zero, path=os.environ["PATH"]):
        assert told == read
