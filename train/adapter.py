"""A trained adapter on disk: PEFT's own format, the base named and hashed, and the way from there to a whole model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoProcessor, ProcessorMixin

from anchorformer.errors import UserError
from anchorformer.hub import load, read_mapping, read_object
from anchorformer.model_folder import MANIFEST, derive_folder, partial_of, read_index, sha256, write_manifest
from anchorformer.weights import check_folder, load_model
from train.choices import Part
from train.config import LoraConfig
from train.lora import peft_config

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT writes in front of every name."""
QUESTIONS = (
    "What is in the image?", "Describe it in one sentence.", "What colour is it?", "How many objects are there?",
    "Is there any text?", "What is on the left?", "Which value is the largest?", "What is unusual here?",
)  # fmt: skip
"""What a merged model and its adapter are both asked, each about a picture of its own."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By how much of the largest logit the two may differ, by the dtype that merged weights are rounded to."""


@dataclass(frozen=True)
class Proof:
    """How far a merged model is from its adapter.

    Attributes:
        prompts: that both were asked.
        difference: the largest of the fp32 logits of the two.
        effect: the largest that the adapter and its connector make to the base's.
        largest: of the logits themselves, in size.
        tolerance: largest difference allowed.
    """

    prompts: int
    difference: float
    effect: float
    largest: float
    tolerance: float


def write_adapter(
    out: Path, tensors: Mapping[str, Tensor], lora: LoraConfig, base: Path, processor: ProcessorMixin
) -> Path:
    """Adapter and connector as one PEFT adapter of the whole model; the folder appears only when complete.

    `PeftModel.from_pretrained(model of base, out)` puts the connector, which PEFT calls a module to save, in the place
    of the base's.

    Args:
        tensors: of the adapter and of parts trained whole, under their full names.

    Raises:
        OSError, safetensors.SafetensorError: the disk does not take it.
    """
    partial = partial_of(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    named = {PREFIX + name.replace(".default.", "."): value.contiguous() for name, value in tensors.items()}
    save_file(named, partial / WEIGHTS, metadata={"format": "pt"})
    whole = sorted({name.split(".", 1)[0] for name in tensors} - {Part.language_model.value})
    description = peft_config(
        lora, base_model_name_or_path=str(base), modules_to_save=whole or None, inference_mode=True,
        # PEFT keeps these facts as they are; the first two are what its AutoPeftModel builds the base with.
        auto_mapping={"base_model_class": "AnchorFormerForConditionalGeneration",
                      "parent_library": "anchorformer.modeling", "base_sha256": sha256(base / MANIFEST)},
    )  # fmt: skip
    description.save_pretrained(partial, auto_mapping_dict=description.auto_mapping)
    processor.save_pretrained(partial)
    write_manifest(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


def base_of(adapter: Path) -> Path:
    """The model folder that an adapter was trained on.

    Raises:
        UserError: no adapter.
    """
    return Path(str(_description(adapter)["base_model_name_or_path"]))


def merge(adapter: Path, base: Path, out: Path) -> Path:
    """The base with connector and adapter in it, as an ordinary model folder; untouched parts are linked.

    `W + alpha / rank * B A` (Hu et al., 2021, section 4.1) is computed in fp32 and rounded to the dtype of W.

    Raises:
        UserError: no adapter, a damaged one, or another base than it was trained on.
    """
    description = _check(adapter, base)
    tensors = {name.removeprefix(PREFIX): value for name, value in load_file(adapter / WEIGHTS).items()}
    ups = {name: value for name, value in tensors.items() if name.endswith(".lora_B.weight")}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if ".lora_" not in name:
            parts.setdefault(name.split(".", 1)[0], {})[name] = value
    own = parts[Part.language_model.value] = _part(base, Part.language_model)
    scale = description["lora_alpha"] / description["r"]
    for name, up in tqdm(ups.items(), "merging", delay=5, leave=False):
        weight = name.replace(".lora_B.", ".")
        down = tensors[name.replace(".lora_B.", ".lora_A.")]
        own[weight] = (own[weight].float() + scale * (up.float() @ down.float())).to(own[weight].dtype)
    processor = load("processor", adapter, AutoProcessor.from_pretrained)
    return derive_folder(base, parts, out, processor)


def prove(adapter: Path, base: Path, merged: Path) -> Proof:
    """Asks the merged model, and the base with the adapter that PEFT itself has read beside it, the same questions.

    All logits of eight prompts with an image each are compared in fp32, on the CPU.

    Raises:
        UserError: they differ by more than the tolerance.
    """
    from peft import PeftModel

    processor = load("processor", adapter, AutoProcessor.from_pretrained)
    stored = {value.dtype for value in _part(merged, Part.language_model).values()}
    model: Any = PeftModel.from_pretrained(load_model(base, torch.float32).eval(), str(adapter)).eval()
    adapted = _logits(model, processor)
    with model.disable_adapter():
        plain = _logits(model, processor)
    del model
    joined = _logits(load_model(merged, torch.float32).eval(), processor)
    largest = max(float(logits.abs().max()) for logits in adapted)
    proof = Proof(
        len(adapted), _furthest(joined, adapted), _furthest(adapted, plain), largest,
        largest * max(TOLERANCE.get(dtype, 0.0) for dtype in stored),
    )  # fmt: skip
    if not proof.difference <= proof.tolerance:
        raise UserError(
            f"the merged model does not say what the adapter says: {merged}", found=f"logits {proof.difference:.3g} "
            f"apart (the adapter moves them by {proof.effect:.3g})", expected=f"at most {proof.tolerance:.3g}",
            remedy="use the base with the adapter beside it, and report this",
        )  # fmt: skip
    return proof


@torch.no_grad()
def _logits(model: nn.Module, processor: Any) -> list[Tensor]:
    found = []
    for number, question in enumerate(QUESTIONS):
        shades = Image.linear_gradient("L").rotate(45 * number)
        picture = Image.merge("RGB", (shades, shades.rotate(90), shades.rotate(180)))
        inputs = processor(images=picture, conversations=[[("user", f"<image>\n{question}")]])
        found.append(model(**inputs).logits)
    return found


def _furthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))


def _part(folder: Path, part: Part) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted({file for name, file in read_index(folder).items() if name.startswith(f"{part.value}.")}):
        tensors |= load_file(folder / file)
    return tensors


def _description(adapter: Path) -> dict[str, Any]:
    if not (adapter / CONFIG).is_file():
        raise UserError(
            f"{adapter} is no adapter", found=f"no {CONFIG}", expected="the adapter/ of a run with stage.lora",
            remedy="pass such a run, or its adapter folder",
        )  # fmt: skip
    return read_object(adapter / CONFIG)


def _check(adapter: Path, base: Path) -> dict[str, Any]:
    description = _description(adapter)
    wanted = (description.get("auto_mapping") or {}).get("base_sha256")
    if wanted is None or not (adapter / MANIFEST).is_file():
        raise UserError(
            f"{adapter} does not say what it was trained on", found=f"no base_sha256 in {CONFIG}, or no {MANIFEST}",
            expected="an adapter written by `python -m train`", remedy="merge it with PEFT itself, without a proof",
        )  # fmt: skip
    for name, entry in read_mapping(adapter / MANIFEST, "files").items():
        if not (adapter / name).is_file() or sha256(adapter / name) != entry["sha256"]:
            raise UserError(
                f"adapter {adapter} is damaged at {name}", found="another sha256 than the manifest's, or no file",
                expected=entry["sha256"], remedy="restore the file",
            )  # fmt: skip
    check_folder(base, every_hash=True)
    found = sha256(base / MANIFEST)
    if found != wanted:
        raise UserError(
            "the adapter was trained on another base", found=f"{base} with a manifest of sha256 {found[:16]}...",
            expected=f"{description['base_model_name_or_path']} with {wanted[:16]}...",
            remedy="name the folder that it was trained on, base=FOLDER",
        )  # fmt: skip
    return description
