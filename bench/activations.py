"""What one language-model layer of 7B width keeps for backward, per token: as transformers has it, and made lean."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from anchorformer.kernels.attention import TEXT_ATTENTION
from anchorformer.lean import make_lean
from bench.runner import Row, Size, as_accurate, cpu_seconds, error, saved_bytes

GOALS = {"frozen": 95.0, "trainable": 133.0}
"""KiB per token and layer at most."""


def rows(size: Size) -> Iterator[Row]:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, max_position_embeddings=2048
    )
    positions = 162
    if size is Size.tiny:
        config = LlamaConfig(hidden_size=64, intermediate_size=160, num_attention_heads=4)
        positions = 16
    for kind in ("frozen", "trainable"):
        yield from _layer(config, positions, kind, size)


class _Layer:
    """One decoder layer on one sample, without a mask: alone in its row, causality says it all."""

    def __init__(self, layer: nn.Module, rotary: nn.Module, x: Tensor, flat: bool) -> None:
        self.layer, self.x = layer, x
        positions = torch.arange(x.shape[1])[None]
        self._arguments: dict[str, Any] = {
            "position_embeddings": rotary(x, positions), "position_ids": positions, "attention_mask": None,
        }  # fmt: skip
        if flat:
            borders = torch.tensor([0, x.shape[1]], dtype=torch.int32)
            self._arguments |= {"cu_seq_lens_q": borders, "max_length_q": x.shape[1]}

    @property
    def besides(self) -> list[Tensor]:
        return [self.x, *self.layer.parameters(), *self._arguments["position_embeddings"]]

    def forward(self) -> Tensor:
        out = self.layer(self.x.requires_grad_(), **self._arguments)
        return out if isinstance(out, Tensor) else out[0]

    def step(self) -> list[Tensor]:
        """Output and the gradients of the input and of every weight that trains."""
        out = self.forward()
        wanted = [self.x, *(weight for weight in self.layer.parameters() if weight.requires_grad)]
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def _layer(config: LlamaConfig, positions: int, kind: str, size: Size) -> Iterator[Row]:
    torch.manual_seed(0)
    published, ours = copy.deepcopy(config), copy.deepcopy(config)
    published._attn_implementation, ours._attn_implementation = "sdpa", TEXT_ATTENTION
    rotary = LlamaRotaryEmbedding(config)
    x = torch.randn(1, positions, config.hidden_size)
    plain = LlamaDecoderLayer(published, 0).requires_grad_(kind == "trainable")
    lean = LlamaDecoderLayer(ours, 0).requires_grad_(kind == "trainable")
    # One set of weights: at this width two would be a gigabyte more.
    lean.load_state_dict(plain.state_dict(keep_vars=True), assign=True)
    if not make_lean(lean):
        raise RuntimeError("no module of the layer was made lean")
    reference = _Layer(plain, rotary, x, flat=False).step()
    exact = _Layer(lean, rotary, x, flat=True).step()
    equal = all(error(a, b) < 1e-5 for a, b in zip(exact, reference, strict=True))
    plain.bfloat16()
    lean.load_state_dict(plain.state_dict(keep_vars=True), assign=True)
    x = x.detach().bfloat16()
    old, new = _Layer(plain, rotary, x, flat=False), _Layer(lean, rotary, x, flat=True)
    equal &= all(map(as_accurate, new.step(), old.step(), reference))
    del reference, exact
    note = (
        "equal: output and all gradients to 1e-5 in fp32, and in bf16 at most twice as far from fp32 as transformers'"
    )
    per_token = 1024 * positions
    old_bytes, _ = saved_bytes(old.forward, old.besides)
    new_bytes, _ = saved_bytes(new.forward, new.besides)
    where = f"one language-model layer, width {config.hidden_size}, {kind}, bf16"
    yield Row(
        name=f"{where}: saved per token", unit="KiB", old=old_bytes / per_token, new=new_bytes / per_token, equal=equal,
        goal=None if size is Size.tiny else GOALS[kind], note=note,
    )  # fmt: skip
    seconds = cpu_seconds({"old": old.step, "new": new.step}, repeats=2)
    yield Row(
        name=f"{where}: time", unit="ms", old=seconds["old"] * 1e3, new=seconds["new"] * 1e3, equal=equal, note=note
    )
