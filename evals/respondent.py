"""The model as it is asked: batches of questions in, greedy answers or losses out."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import anchorformer.auto  # noqa: F401  (makes the processor known to AutoProcessor)
from anchorformer import hub
from anchorformer.errors import UserError
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.weights import MANIFEST, check_folder, load_model, sha256
from data.collate import collate
from data.images import load as load_image
from evals.config import Device, EvalConfig, Precision
from evals.questions import Question


class ModelRespondent:
    """Answers questions with a model and its processor.

    Args:
        batch_size: questions answered together; rows are padded on the left, so answers do not depend on it.
        facts: what to write beside every score: model, template, precision, versions.
    """

    def __init__(
        self,
        model: AnchorFormerForConditionalGeneration,
        processor: AnchorFormerProcessor,
        batch_size: int,
        facts: dict[str, Any],
    ) -> None:
        self._model = model.eval()
        self._processor = processor
        self._batch_size = batch_size
        self.facts = facts

    @torch.inference_mode()
    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Greedy answers without surrounding white space; each ends at the template's stop or at `max_new_tokens`."""
        tokenizer = self._processor.tokenizer
        texts: list[str] = []
        for chunk in self._chunks(questions, "answering"):
            images = [[load_image(ref) for ref in item.images] for item in chunk]
            inputs = self._processor(images, conversations=[item.turns for item in chunk]).to(self._model.device)
            ids_BL = self._model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=self._processor.stop_token_ids,
            )
            new_BL = ids_BL[:, inputs["input_ids"].shape[1] :]
            texts += [text.strip() for text in tokenizer.batch_decode(new_BL, skip_special_tokens=True)]
        return texts

    @torch.inference_mode()
    def answer_losses(self, questions: Sequence[Question]) -> list[tuple[float, int]]:
        """Summed negative log likelihood (nats) of each question's first reference, and its number of tokens."""
        losses: list[tuple[float, int]] = []
        for chunk in self._chunks(questions, "reading"):
            examples = [
                self._processor.encode(
                    [*item.turns, ("assistant", item.references[0])],
                    [load_image(ref) for ref in item.images],
                    sample_id=item.id,
                )
                for item in chunk
            ]
            batch = collate(examples).to(self._model.device)
            logits_QD = self._model(
                input_ids=batch.input_ids_S[None],
                position_ids=batch.position_ids_S[None],
                cu_seqlens=batch.cu_seqlens,
                max_seqlen=batch.max_seqlen,
                pixel_values=batch.tiles_B3HW,
                logits_to_keep=batch.predict_index_Q,
            ).logits[0]
            nll_Q = cross_entropy(logits_QD.float(), batch.targets_Q, reduction="none").double()
            sample_Q = torch.bucketize(batch.predict_index_Q, batch.cu_seqlens[1:], right=True)
            sums = torch.zeros(len(chunk), dtype=torch.float64, device=nll_Q.device).index_add_(0, sample_Q, nll_Q)
            losses += zip(sums.tolist(), sample_Q.bincount(minlength=len(chunk)).tolist(), strict=True)
        return losses

    def _chunks(self, questions: Sequence[Question], verb: str) -> Iterator[Sequence[Question]]:
        with tqdm(total=len(questions), desc=verb, unit=" questions", delay=2, leave=False) as progress:
            for start in range(0, len(questions), self._batch_size):
                chunk = questions[start : start + self._batch_size]
                yield chunk
                progress.update(len(chunk))


def load(folder: Path, config: EvalConfig) -> ModelRespondent:
    """The model of a folder, on the device and in the precision of the config.

    Raises:
        UserError: the folder is damaged or not one of ours, the template does not fit, or there is no such device.
    """
    check_folder(folder)
    device = _device(config.device)
    precision = config.precision
    if precision is Precision.auto:
        precision = Precision.bf16 if device.type == "cuda" else Precision.fp32
    processor: AnchorFormerProcessor = hub.load("processor", folder, AnchorFormerProcessor.from_pretrained)
    if config.template is not None:
        processor = processor.with_template(config.template)
    model = load_model(folder, torch.float32 if precision is Precision.fp32 else torch.bfloat16).to(device)
    facts = {
        "model": str(folder),
        "model_sha256": sha256(folder / MANIFEST),
        "template": processor.template,
        "visual_tokens_per_image": processor.num_image_tokens,
        "image_size": processor.image_transform.image_size,
        "precision": precision.value,
        "machine": machine(device),
        "batch_size": config.batch_size,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("anchorformer", "torch", "transformers")},
        },
    }
    return ModelRespondent(model, processor, config.batch_size, facts)


def machine(device: torch.device) -> str:
    """What the numbers were measured on: the accelerator, or the processor and its cores."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores, {name}, {torch.get_num_threads()} thread(s)"


def _device(wanted: Device) -> torch.device:
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted is Device.auto:
        return torch.device(found)
    if wanted is Device.cuda and found == "cpu":
        raise UserError(
            "there is no CUDA device here", found="device=cuda", expected="a visible GPU", remedy="set device=cpu"
        )
    return torch.device(wanted.value)
