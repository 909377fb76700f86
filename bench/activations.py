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
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
    positions = 162
    if size is Size.tiny:
        config = LlamaConfig(hidden_size=64, intermediate_size=160, num_attention_heads=4)
        positions = 16
    torch.manual_seed(0)
    pair = _Pair(config, torch.randn(1, positions, config.hidden_size))
    old_fp32, new_fp32 = pair.old.step(), pair.new.step()
    exact = all(error(new, old) < 1e-5 for new, old in zip(new_fp32, old_fp32, strict=True))
    pair.to_bf16()
    for kind in ("trainable", "frozen"):
        pair.old.layer.requires_grad_(kind == "trainable")
        pair.new.layer.requires_grad_(kind == "trainable")
        old, new = pair.old.step(), pair.new.step()
        # Frozen, output and gradient of the input are left: the first two.
        equal = exact and all(as_accurate(*triple) for triple in zip(new, old, old_fp32, strict=False))
        yield from _rows(pair, kind, size, equal)


class _Layer:
    """One decoder layer on one sample, without a mask: alone in its row, causality says it all."""

    def __init__(self, layer: nn.Module, rotary: nn.Module, x: Tensor, flat: bool) -> None:
        self.layer, self._rotary, self._flat = layer, rotary, flat
        self.look_at(x)

    def look_at(self, x: Tensor) -> None:
        self.x = x.detach().requires_grad_()
        positions = torch.arange(x.shape[1])[None]
        self._arguments: dict[str, Any] = {
            "position_embeddings": self._rotary(x, positions), "position_ids": positions, "attention_mask": None,
        }  # fmt: skip
        if self._flat:
            borders = torch.tensor([0, x.shape[1]], dtype=torch.int32)
            self._arguments |= {"cu_seq_lens_q": borders, "max_length_q": x.shape[1]}

    @property
    def besides(self) -> list[Tensor]:
        return [self.x, *self.layer.parameters(), *self._arguments["position_embeddings"]]

    def forward(self) -> Tensor:
        out = self.layer(self.x, **self._arguments)
        return out if isinstance(out, Tensor) else out[0]

    def step(self) -> list[Tensor]:
        """Output and the gradients of the input and of every weight that trains."""
        out = self.forward()
        wanted = [self.x, *(weight for weight in self.layer.parameters() if weight.requires_grad)]
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


class _Pair:
    """The same weights in a layer as transformers runs it and in a lean one of ours."""

    def __init__(self, config: LlamaConfig, x: Tensor) -> None:
        plain, ours = copy.deepcopy(config), copy.deepcopy(config)
        plain._attn_implementation, ours._attn_implementation = "sdpa", TEXT_ATTENTION
        rotary = LlamaRotaryEmbedding(config)
        published = LlamaDecoderLayer(plain, 0)
        with torch.device("meta"):
            lean = LlamaDecoderLayer(ours, 0)
        if not make_lean(lean):
            raise RuntimeError("no module of the layer was made lean")
        self.old = _Layer(published, rotary, x, flat=False)
        self.new = _Layer(lean, rotary, x, flat=True)
        self._share()

    def _share(self) -> None:
        self.new.layer.load_state_dict(self.old.layer.state_dict(keep_vars=True), assign=True)

    def to_bf16(self) -> None:
        # One set of weights for both: at this width two would be a gigabyte more.
        self.old.layer.bfloat16()
        self._share()
        for layer in (self.old, self.new):
            layer.look_at(layer.x.bfloat16())


def _rows(pair: _Pair, kind: str, size: Size, equal: bool) -> Iterator[Row]:
    old, new = pair.old, pair.new
    positions, width = new.x.shape[1:]
    note = (
        "equal: output and all gradients to 1e-5 in fp32, and in bf16 at most twice as far from fp32 as transformers'"
    )
    old_bytes, _ = saved_bytes(old.forward, old.besides)
    new_bytes, _ = saved_bytes(new.forward, new.besides)
    where = f"one language-model layer, width {width}, {kind}, bf16"
    per_token = 1024 * positions
    yield Row(
        name=f"{where}: saved per token", unit="KiB", old=old_bytes / per_token, new=new_bytes / per_token, equal=equal,
        goal=None if size is Size.tiny else GOALS[kind], note=note,
    )  # fmt: skip
    if size is not Size.quick:
        seconds = cpu_seconds({"old": old.step, "new": new.step}, repeats=2)
        yield Row(
            name=f"{where}: time", unit="ms", old=seconds["old"] * 1e3, new=seconds["new"] * 1e3, equal=equal, note=note
        )
