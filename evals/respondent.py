"""The model as it is asked: batches of questions in, answers or losses out."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import anchorformer.auto  # noqa: F401  (makes the processor known to AutoProcessor)
from anchorformer import decoding as decodings
from anchorformer import hub, selectors
from anchorformer.decoding.base import Decoding, DecodingConfig, Sight
from anchorformer.decoding.greedy import Greedy
from anchorformer.devices import Device, Precision
from anchorformer.errors import UserError
from anchorformer.model_folder import MANIFEST, sha256
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.reselect import with_selector
from anchorformer.schema import parse_plugin, to_plain
from anchorformer.seen import look
from anchorformer.selectors.base import SelectorConfig
from anchorformer.weights import check_folder, load_model
from data.collate import collate
from data.config import OnBad
from data.features import FeatureCache
from data.fill import fill, images_digest
from data.images import load as load_image
from data.record import ImageRef
from evals.config import EvalConfig
from evals.memory import GIB, Memory
from evals.questions import Question

REMEDY = "correct it; `python -m evals --help` lists the keys"
MEASURED = 64
"""Images that tell how many visual tokens one has, where that depends on what it shows."""


class ModelRespondent:
    """Answers questions with a model and its processor; an image that a batch asks about often is encoded once.

    Args:
        batch_size: questions answered together; rows are padded on the left, in fp32 answers do not depend on it.
        facts: what to write beside every score: model, template, precision, versions.
        features: filled with what the vision tower says of every tile that is asked about; None runs it.
        decoding: of this model, for answers; None is greedy.
        among_ranks: whether a forward pass of the model is a collective (ZeRO-3): none then leaves a generation before
            all have their answers.
    """

    def __init__(
        self,
        model: AnchorFormerForConditionalGeneration,
        processor: AnchorFormerProcessor,
        batch_size: int,
        facts: dict[str, Any],
        *,
        features: FeatureCache | None = None,
        decoding: Decoding | None = None,
        among_ranks: bool = False,
    ) -> None:
        self._model = model.eval()
        self._greedy = Greedy(model)
        self._decoding = decoding or self._greedy
        self._processor = processor
        self._batch_size = batch_size
        self._features = features
        self._among_ranks = among_ranks
        self.facts = facts

    @torch.no_grad()  # not inference_mode, whose tensors ZeRO-3 would keep and then could not train on
    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Answers without surrounding white space; each ends at the template's stop or at `max_new_tokens`."""
        tokenizer = self._processor.tokenizer
        texts: list[str] = []
        for chunk in self._chunks(questions, "answering"):
            images = _opened(chunk)
            seen = self._look(images, self._decoding)
            rows = [
                self._processor.prompt(
                    item.turns,
                    [images[ref] for ref in item.images],
                    sample_id=item.id,
                    token_counts=[seen[ref].counts for ref in item.images],
                )
                for item in chunk
            ]
            inputs = self._processor.pad(rows).to(self._model.device)
            sight = Sight.of([seen[ref] for item in chunk for ref in item.images])
            ids_BL = self._model.generate(
                **inputs,
                image_embeds=None if sight is None else sight.embeds,
                logits_processor=self._decoding.logits_processors(inputs["input_ids"], inputs["attention_mask"], sight),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=self._processor.stop_token_ids,
                synced_gpus=self._among_ranks,
            )
            new_BL = ids_BL[:, inputs["input_ids"].shape[1] :]
            texts += [text.strip() for text in tokenizer.batch_decode(new_BL, skip_special_tokens=True)]
        return texts

    @torch.no_grad()
    def answer_losses(self, questions: Sequence[Question]) -> list[tuple[float, int]]:
        """Summed negative log likelihood (nats) of each question's first reference, and its number of tokens."""
        losses: list[tuple[float, int]] = []
        for chunk in self._chunks(questions, "reading"):
            images = _opened(chunk)
            seen = self._look(images, self._greedy)
            examples = [
                self._processor.encode(
                    [*item.turns, ("assistant", item.references[0])],
                    [images[ref] for ref in item.images],
                    sample_id=item.id,
                    token_counts=[seen[ref].counts for ref in item.images],
                )
                for item in chunk
            ]
            batch = collate(examples).to(self._model.device)
            sight = Sight.of([seen[ref] for item in chunk for ref in item.images])
            logits_QD = self._model(
                input_ids=batch.input_ids_S[None],
                position_ids=batch.position_ids_S[None],
                cu_seqlens=batch.cu_seqlens,
                max_seqlen=batch.max_seqlen,
                image_embeds=None if sight is None else sight.embeds,
                logits_to_keep=batch.predict_index_Q,
            ).logits[0]
            nll_Q = cross_entropy(logits_QD.float(), batch.targets_Q, reduction="none").double()
            sample_Q = torch.bucketize(batch.predict_index_Q, batch.cu_seqlens[1:], right=True)
            sums = torch.zeros(len(chunk), dtype=torch.float64, device=nll_Q.device).index_add_(0, sample_Q, nll_Q)
            losses += zip(sums.tolist(), sample_Q.bincount(minlength=len(chunk)).tolist(), strict=True)
        return losses

    def peak_gib(self) -> float:
        """The most memory that this process has held: on the card, or in RAM where it computes on the CPU."""
        return Memory.of(self._model.device).computing / GIB

    def tokens_per_image(self, questions: Sequence[Question]) -> int | None:
        """Visual tokens of an image, the mean of at most MEASURED that are spread evenly over the questions; None where
        no question has one."""
        refs = [*dict.fromkeys(ref for item in questions for ref in item.images)]
        spread = [refs[place * len(refs) // MEASURED] for place in range(MEASURED)] if len(refs) > MEASURED else refs
        counts: list[int] = []
        for start in range(0, len(spread), self._batch_size):
            seen = self._look({ref: load_image(ref) for ref in spread[start : start + self._batch_size]}, self._greedy)
            counts += [sum(each.counts) for each in seen.values()]
        return round(sum(counts) / len(counts)) if counts else None

    def _look(self, images: Mapping[ImageRef, Image.Image], decoding: Decoding) -> dict[ImageRef, Sight]:
        """What is seen of each image, all of them looked at together."""
        features = None if self._features is None else self._features.read
        return dict(zip(images, look(decoding, self._processor, [*images.values()], features), strict=True))

    def _chunks(self, questions: Sequence[Question], verb: str) -> Iterator[Sequence[Question]]:
        one = len(questions) <= self._batch_size  # whoever asks batch by batch shows how far that is
        with tqdm(total=len(questions), desc=verb, unit=" questions", delay=2, leave=False, disable=one) as progress:
            for start in range(0, len(questions), self._batch_size):
                chunk = questions[start : start + self._batch_size]
                yield chunk
                progress.update(len(chunk))


def _opened(questions: Sequence[Question]) -> dict[ImageRef, Image.Image]:
    """Every image that is asked about, opened once."""
    return {ref: load_image(ref) for ref in dict.fromkeys(ref for item in questions for ref in item.images)}


def load(folder: Path, config: EvalConfig, questions: Sequence[Question] = ()) -> ModelRespondent:
    """The model of a folder, on the device and in the precision of the config.

    Args:
        questions: all that will be asked, where the config names a feature cache: it is filled for them here.

    Raises:
        UserError: the folder is damaged or not one of ours, the template does not fit, or there is no such device; an
            image that cannot be read, or a disk without room for its features.
    """
    decoding = parse_plugin(DecodingConfig, config.decoding, decodings.__name__, "decoding", REMEDY)
    described = check_folder(folder)
    device = _device(config.device)
    precision = config.precision
    if precision is Precision.auto:
        precision = Precision.bf16 if device.type == "cuda" else Precision.fp32
    processor: AnchorFormerProcessor = hub.load("processor", folder, AnchorFormerProcessor.from_pretrained)
    if config.template is not None:
        processor = processor.with_template(config.template)
    dtype = torch.float32 if precision is Precision.fp32 else torch.bfloat16
    model = load_model(folder, dtype).to(device).eval()
    if config.selector:
        selector = parse_plugin(SelectorConfig, config.selector, selectors.__name__, "selector", REMEDY)
        model, processor = with_selector(model, processor, selector)
    features = None
    if config.data.feature_cache is not None:
        features = FeatureCache(Path(config.data.feature_cache), folder, dtype, device)
        fill(
            features, questions, range(len(questions)), processor.image_transform,
            made_of=images_digest(questions, processor.image_transform), on_bad_image=OnBad.error,
        )  # fmt: skip
    respondent = ModelRespondent(
        model, processor, config.batch_size, {}, features=features, decoding=decoding.build(model)
    )
    respondent.facts = {
        "model": str(folder),
        "model_sha256": sha256(folder / MANIFEST),
        "template": processor.template,
        "selector": config.selector or model.config.selector,
        **_visual(processor, respondent, questions),
        # Layers that have one read every visual token besides.
        **({} if described.integration is None else {"integration": described.integration}),
        "precision": precision.value,
        "vision_features": "live" if features is None else "cached",  # which took no time then
        "machine": machine(device),
        "batch_size": config.batch_size,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("anchorformer", "torch", "transformers")},
        },
    }
    return respondent


def _visual(
    processor: AnchorFormerProcessor, respondent: ModelRespondent, questions: Sequence[Question]
) -> dict[str, Any]:
    """What the language model sees of an image: of one with the most tiles, where they depend on its size; where they
    depend on what it shows, the mean of some of those that are asked about."""
    transform, fixed = processor.image_transform, processor.num_image_tokens
    tiling = transform.tiling
    return {
        "visual_tokens_per_image": respondent.tokens_per_image(questions)
        if fixed is None
        else fixed * tiling.views(max(tiling.counts)),
        "image_size": transform.image_size,
        **({"tiling": to_plain(tiling)} if tiling.grids else {}),
    }


def machine(device: torch.device) -> str:
    """What the numbers were measured on: the accelerator, or the processor and its cores."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores, {name}, {torch.get_num_threads()} thread(s)"


def num_cards(wanted: Device) -> int:
    """CUDA devices that an evaluation may use; 0 where it runs on the CPU."""
    return torch.cuda.device_count() if _device(wanted).type == "cuda" else 0


def _device(wanted: Device) -> torch.device:
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted is Device.auto:
        return torch.device(found)
    if wanted is Device.cuda and found == "cpu":
        raise UserError(
            "there is no CUDA device here", found="device=cuda", expected="a visible GPU", remedy="set device=cpu"
        )
    return torch.device(wanted.value)
