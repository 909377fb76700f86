"""The adapter in a model that is trained: which layers get one, how it starts, and the 4-bit weights beneath it."""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anchorformer.devices import Device
from anchorformer.errors import UserError
from train.choices import Part
from train.config import LoraConfig, RunConfig

log = logging.getLogger(__name__)

_ADAPTER = re.compile(r"\.lora_[AB]\.")


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, by PEFT's names."""
    return _ADAPTER.search(name) is not None


def check_adapter(config: RunConfig, start: Path) -> None:
    """Finds before any rank is started what each of them would find.

    Raises:
        UserError: a target that is no linear layer of the language model's blocks; 4-bit weights without CUDA or
            without bitsandbytes.
    """
    lora = config.stage.lora
    if lora is None:
        return
    from transformers import AutoModelForCausalLM

    from anchorformer.configuration import AnchorFormerConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AnchorFormerConfig.from_pretrained(start).text_config)
    check_targets(model, lora)
    if not lora.quantize:
        return
    if config.hardware.device is Device.auto and not torch.cuda.is_available():
        raise UserError(
            "4-bit weights are computed with on CUDA only", found="stage.lora.quantize=true, no CUDA device visible",
            expected="a CUDA device for every rank", remedy="set lora=default on CPU",
        )  # fmt: skip
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "4-bit weights need bitsandbytes", found="no such package", expected="the extra of that name",
            remedy="pip install -e '.[train,qlora]' -c constraints.txt",
        )  # fmt: skip


def check_targets(language_model: nn.Module, lora: LoraConfig) -> None:
    """
    Raises:
        UserError: a target that no linear layer of a block is called.
    """
    linears = block_linears(language_model)
    known = sorted({name.rpartition(".")[2] for name in linears})
    unknown = [target for target in lora.targets if not any(f".{name}".endswith(f".{target}") for name in linears)]
    if unknown:
        raise UserError(
            "stage.lora.targets names layers that the language model's blocks do not have", found=", ".join(unknown),
            expected=f"some of {', '.join(known)}", remedy=f"e.g. stage.lora.targets=[{','.join(known[:4])}]",
        )  # fmt: skip


def block_linears(language_model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a language model by name, without its head, which may be the embeddings' own weights."""
    head = language_model.get_output_embeddings()  # type: ignore[operator]
    modules = language_model.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear) and module is not head}


def peft_config(lora: LoraConfig, **facts: Any) -> Any:
    """PEFT's own description of the adapter of a whole model, vision tower and connector left out of it.

    Args:
        facts: further fields of `peft.LoraConfig`.
    """
    from peft import LoraConfig as PeftLoraConfig

    endings = "|".join(re.escape(target) for target in lora.targets)
    return PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias="none",
        target_modules=rf"{Part.language_model.value}\.(?:.*\.)?(?:{endings})", **facts,
    )  # fmt: skip


def add_adapter(model: nn.Module, lora: LoraConfig, seed: int, device: torch.device) -> None:
    """Puts an adapter beside every target, in place and by PEFT; it adds nothing until it has learnt something.

    The matrices are drawn from `seed` alone, alike on every rank, and have the dtype of the weights beside them.

    Raises:
        UserError: a target that no linear layer of a block is called.
    """
    from peft import inject_adapter_in_model

    language_model: Any = getattr(model, Part.language_model.value)
    check_targets(language_model, lora)
    if lora.quantize:
        log.info("%d linear layers are kept in 4 bits", quantize(language_model, device))
        # PEFT asks for it before it believes that layers are packed.
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(peft_config(lora), model)


def quantize(language_model: nn.Module, device: torch.device) -> int:
    """Puts 4-bit layers in the place of the linear layers of all blocks: NF4, scales quantized too, computed in bf16.

    As in QLoRA (Dettmers et al., 2023, section 3). The layers are packed when they reach the device.

    Returns:
        how many layers there are.
    """
    import bitsandbytes

    linears = block_linears(language_model)
    for name, linear in linears.items():
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=torch.bfloat16,
            compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        packed.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
        )
        packed.bias = linear.bias
        parent, _, own = name.rpartition(".")
        setattr(language_model.get_submodule(parent), own, packed.to(device))
    return len(linears)
