"""What a training step runs: fused attention only where it is chosen, and nothing that makes the host wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from anchorformer.contracts import Batch
from anchorformer.kernels import attention
from anchorformer.kernels.backend import Backend
from tests.train.cases import FINETUNE, batches_for, load_frozen, run_config
from train.loss import supervised_loss

SCORES = {"aten::_softmax", "aten::_softmax_backward_data", "aten::_scaled_dot_product_attention_math"}
"""What attention is made of when its scores are a tensor."""
WAITING = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::_local_scalar_dense"}
"""Operations whose result the host has to know before it can go on."""
ALL = [list(range(8))]

DEVICES = [
    pytest.param("cpu", torch.float32, id="cpu"),
    pytest.param("cuda", torch.bfloat16, id="cuda bf16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float32, id="cuda fp32", marks=pytest.mark.gpu),
]


def _step(folder: Path, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Batch]:
    model = load_frozen(folder, run_config(FINETUNE), dtype).to(device).train()
    (batch,) = batches_for(model, ALL)
    batch = batch.to(torch.device(device))
    supervised_loss(model, batch, batch.num_supervised).backward()  # everything is chosen, compiled and loaded
    return model, batch


def _ops(model: torch.nn.Module, batch: Batch) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        supervised_loss(model, batch, batch.num_supervised).backward()
    return Counter({event.key: event.count for event in profiler.key_averages()})


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_attention_is_fused_in_every_part_forward_and_backward(
    tiny_folder: Path, device: str, dtype: torch.dtype
) -> None:
    ops = _ops(*_step(tiny_folder, device, dtype))
    assert not SCORES & ops.keys()
    fused = [name for name in ops if "_attention" in name or "_attn" in name]
    assert any("backward" in name for name in fused), fused


def test_attention_with_scores_would_be_found(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "choose", lambda *_, **__: Backend.matmul)
    assert SCORES & _ops(*_step(tiny_folder, "cpu", torch.float32)).keys()


def test_the_host_waits_for_nothing_but_one_count_of_its_own(tiny_folder: Path) -> None:
    """On CPU, where the count of placeholders is compared at once because that costs nothing there."""
    ops = _ops(*_step(tiny_folder, "cpu", torch.float32))
    assert {name: ops[name] for name in WAITING & ops.keys()} == {"aten::_local_scalar_dense": 1}


@contextmanager
def _no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_host_never_waits_for_the_device(tiny_folder: Path, dtype: torch.dtype) -> None:
    model, batch = _step(tiny_folder, "cuda", dtype)
    with _no_waiting():
        loss = supervised_loss(model, batch, batch.num_supervised)
        loss.backward()
    assert loss.isfinite()
    with pytest.raises(RuntimeError, match="synchroniz"), _no_waiting():
        float(loss)
