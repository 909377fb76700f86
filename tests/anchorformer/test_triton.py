"""Triton without a card: its kernels in the interpreter, compiled for two generations of cards, and who runs where."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig

from anchorformer.contracts import VisionNeeds
from anchorformer.errors import UserError
from anchorformer.kernels import backend, vision_attention
from anchorformer.kernels.backend import Kernels
from anchorformer.kernels.selection import select_anchors
from anchorformer.selectors.anchor import AnchorSelectorConfig
from anchorformer.vision import VisionTower

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@needs_triton
@pytest.mark.slow
def test_kernels_hold_in_the_interpreter() -> None:
    """In a process of its own, because Triton decides for its interpreter when it is imported."""
    parity = Path(__file__).with_name("test_triton_parity.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(parity), "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- compiled, without a card ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Compiled:
    """What the assembler gave a kernel."""

    registers: int
    stack: int
    spills: int
    matrix_products: int


class _Compiler:
    """Stands in for a kernel: a launch compiles it for `arch`, specialised as Triton specialises a real launch."""

    def __init__(self, kernel: Any, arch: int) -> None:
        self.kernel, self.arch = kernel, arch

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **keywords: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        constants = {name: keywords.pop(name) for name in names if name in keywords}
        signature, attributes = dict.fromkeys(constants, "constexpr"), {}
        for place, (name, value) in enumerate(zip(names, args, strict=False)):
            if isinstance(value, int) and value == 1:
                signature[name], constants[name] = "constexpr", 1
                continue
            signature[name] = _type(value)
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, {name: signature[name] for name in names}, constants, attributes)
        self.cubin = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=keywords).asm["cubin"]

    def read(self, folder: Path) -> _Compiled:
        import triton

        file = folder / "kernel.cubin"
        file.write_bytes(self.cubin)
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        usage = subprocess.check_output([tools / "cuobjdump", "--dump-resource-usage", file], text=True)
        code = subprocess.check_output([tools / "nvdisasm", "-c", file], text=True)
        counts = {name: int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK")}
        spills, products = (len(re.findall(pattern, code)) for pattern in (r"\b(?:STL|LDL)\b", r"\bHG?MMA\b"))
        return _Compiled(registers=counts["REG"], stack=counts["STACK"], spills=spills, matrix_products=products)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _strided(tokens: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of two images with 16 heads, as a tower's projections leave them."""
    return [torch.empty(2, tokens, 16, width, dtype=dtype, device=META).transpose(1, 2) for _ in range(3)]


def _compile(
    module: str, kernel: str, arch: int, folder: Path, monkeypatch: pytest.MonkeyPatch, *args: Any
) -> _Compiled:
    """Compiles the kernel that `launch` of this module launches for these arguments."""
    triton_file = importlib.import_module(f"anchorformer.kernels.{module}")
    compiler = _Compiler(getattr(triton_file, kernel), arch)
    monkeypatch.setattr(triton_file, kernel, compiler)
    triton_file.launch(*args)
    return compiler.read(folder)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("tokens", "registers"), [(577, 104), (5185, 128)])
def test_selection_fits_into_registers(
    tokens: int, registers: int, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 are all that a program of 16 warps can have."""
    scores = torch.empty(2, 16, tokens, device=META)
    found = _compile("selection_triton", "select_kernel", arch, tmp_path, monkeypatch, scores, 145)
    assert found.registers <= registers
    assert (found.stack, found.spills) == (0, 0)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
def test_row_fits_into_registers(arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = _strided(577, 64, torch.bfloat16)
    found = _compile("cls_row_triton", "row_kernel", arch, tmp_path, monkeypatch, query, key, 0.125)
    assert found.registers <= 64
    assert (found.stack, found.spills, found.matrix_products) == (0, 0, 0)


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "arch", "registers"),
    [
        (577, 80, 160),
        (577, 90, 128),
        pytest.param(600, 80, 208, marks=pytest.mark.slow),
        pytest.param(600, 90, 144, marks=pytest.mark.slow),
    ],
)
def test_attention_fits_into_registers(
    tokens: int, arch: int, registers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On sm_90 four programs of four warps share a multiprocessor, which has room for 128 each.

    5185 tokens compile to the kernel of 577: both leave whole tiles beside [CLS], as 600 do not.
    """
    qkv = _strided(tokens, 64, torch.bfloat16)
    found = _compile("vision_attention_triton", "attention_kernel", arch, tmp_path, monkeypatch, *qkv, 0.125)
    assert found.registers <= registers
    assert (found.stack, found.spills) == (0, 0)
    assert found.matrix_products > 0


# --- who runs where --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _as_if_new() -> Iterator[None]:
    backend.use("auto")
    yield
    backend.use("auto")


def test_torch_is_the_default_on_the_cpu_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        assert [backend.kernels_on(CPU) for _ in range(3)] == [Kernels.torch] * 3
    assert [record.getMessage() for record in caplog.records] == ["anchor kernels on cpu: torch (the default on cpu)"]


def test_triton_is_the_default_on_cuda_unless_something_is_in_its_way(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for obstacle, expected in ((None, Kernels.triton), ("triton is not installed", Kernels.torch)):
        monkeypatch.setattr(backend, "triton_obstacle", lambda obstacle=obstacle: obstacle)
        backend.use("auto")
        with caplog.at_level(logging.INFO, logger=backend.__name__):
            assert backend.kernels_on(CUDA) is expected
    assert "triton is not installed" in caplog.records[-1].getMessage()


def test_kernels_that_were_asked_for_and_cannot_run_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_obstacle", lambda: "there is no CUDA device")
    with pytest.raises(UserError, match="cannot run") as caught:
        backend.use("triton")
    assert caught.value.found == "there is no CUDA device"
    monkeypatch.setattr(backend, "triton_obstacle", lambda: None)
    backend.use("triton")
    assert backend.kernels_on(CUDA) is Kernels.triton
    with pytest.raises(UserError, match="on the CPU"):
        select_anchors(torch.randn(1, 4, 50), 9)
    backend.use("torch")
    assert backend.kernels_on(CUDA) is Kernels.torch


def test_another_word_is_an_error() -> None:
    with pytest.raises(UserError, match="unknown kernels"):
        backend.use("cuda")


def test_what_the_fused_attention_cannot_do_is_done_by_its_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason by itself, on what is otherwise a case for the kernel."""
    monkeypatch.setattr(vision_attention, "kernels_on", lambda device: Kernels.triton)
    half = torch.bfloat16
    query, key, value = _strided(577, 64, half)

    def reason(*qkv: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> str:
        return str(vision_attention._obstacle(*qkv, mask, dropout))

    assert reason(query, key, value) == "None"
    assert "trains" in reason(query.detach().requires_grad_(), key, value)
    with torch.no_grad():
        assert reason(query.detach().requires_grad_(), key, value) == "None"
    assert "mask" in reason(query, key, value, mask=torch.ones(1, dtype=torch.bool))
    assert "dropout" in reason(query, key, value, dropout=0.1)
    assert "dtypes" in reason(query.float(), key.float(), value)
    assert "half" in reason(*_strided(577, 64, torch.float32))
    assert "wider" in reason(*_strided(577, 160, half))
    monkeypatch.setattr(vision_attention, "kernels_on", lambda device: Kernels.torch)
    assert "torch computes" in reason(query, key, value)


def test_tower_and_selector_compile_as_one_graph_on_the_twins() -> None:
    config = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14, intermediate_size=64
    )
    tower = VisionTower.from_config(config, VisionNeeds(layer=-2, cls_scores=True)).requires_grad_(False)
    selector, pixels = AnchorSelectorConfig(num_anchors=9).build(17, 4, True), torch.randn(2, 3, 56, 56)
    expected = selector(tower(pixels))
    found = torch.compile(lambda pixels: selector(tower(pixels)), fullgraph=True, backend="aot_eager")(pixels)
    assert torch.equal(found.indices_BT, expected.indices_BT)
    torch.testing.assert_close(found.tokens_BTV, expected.tokens_BTV, atol=1e-5, rtol=1e-5)
