"""The model as lmms-eval 0.7.3 calls it: requests in, answers or losses out in their order; simple form and chat."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import anchorformer.auto  # noqa: F401  (makes the processor known to AutoProcessor)
from anchorformer import hub
from anchorformer.contracts import IGNORE_INDEX
from anchorformer.decoding.greedy import Greedy
from anchorformer.errors import UserError
from anchorformer.harness.requests import Asked, Decoding, from_text
from anchorformer.messages import read_messages
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.seen import look
from anchorformer.weights import check_folder, load_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Round = tuple[Asked | None, list[str], Any]
"""What is asked next (None: nothing), the answers so far as the task has them, and what it remembers."""


class AnchorFormerSimple(lmms):
    """Greedy answers and losses of a model folder or a run, as `python -m evals` gets them.

    Every process reads the whole model; lmms-eval deals the questions to them (`accelerate launch`, `torchrun`).

    Args:
        pretrained: model folder, or a finished run (its `model/` is taken).
        batch_size: questions answered together; rows are padded on the left, answers do not depend on it in float32.
        device: null is this process' GPU, or the CPU where there is none.
        dtype: float32, bfloat16, or auto: bfloat16 on a GPU, float32 on a CPU.
        template: conversation template; null is the one the model was trained with.
        max_batch_size: what lmms-eval hands to every model for `batch_size=auto`, which is not taken.

    Raises:
        UserError: no such folder or a damaged one, a batch size that is no number, no such dtype.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str | None = None, dtype: str = "auto",
        template: str | None = None, max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(
                "the batch size is no number", found=f"batch_size={batch_size}", expected="1 or more",
                remedy="name one; answers do not depend on it",
            )  # fmt: skip
        self.batch_size = int(batch_size)
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = _device(device)
        if dtype not in (*DTYPES, "auto"):
            raise UserError(
                "no such dtype",
                found=f"dtype={dtype}",
                expected=f"auto, {', '.join(DTYPES)}",
                remedy="name one of them",
            )
        automatic = "bfloat16" if self.device.type == "cuda" else "float32"
        path = Path(pretrained)
        folder = path / "model" if (path / "model").is_dir() else path
        if not folder.is_dir():
            raise UserError(
                f"{pretrained} is no model", found="no such folder", expected="a model folder, or a finished run",
                remedy="check the path in --model_args pretrained=...",
            )  # fmt: skip
        check_folder(folder)
        self.processor: AnchorFormerProcessor = hub.load("processor", folder, AnchorFormerProcessor.from_pretrained)
        if template is not None:
            self.processor = self.processor.with_template(template)
        self.model = load_model(folder, DTYPES[automatic if dtype == "auto" else dtype]).to(self.device).eval()

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """One answer per request; with nothing to end it early, those of the native evaluation."""
        answers = [""] * len(requests)
        for options, places in self._batches(requests, "answering"):
            asked = [self._asked(requests[place].args) for place in places]
            for place, answer in zip(places, self._answers(asked, options), strict=True):
                answers[place] = answer
        return answers

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers of all rounds per request; each round is asked as the task writes it, with no memory of ours."""
        answers: list[list[str]] = [[] for _ in requests]
        for options, places in self._batches(requests, "rounds"):
            rounds: dict[int, Round] = {place: (self._asked(requests[place].args), [], None) for place in places}
            number = 0
            while running := {place: asked for place, (asked, _, _) in rounds.items() if asked is not None}:
                number += 1
                for place, answer in zip(running, self._answers(list(running.values()), options), strict=True):
                    _, said, memory = rounds[place]
                    rounds[place] = self._next(requests[place].args, number, [*said, answer], memory)
            for place, (_, said, _) in rounds.items():
                answers[place] = said
        return answers

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Mean negative log likelihood (nats) of each continuation as the whole answer, its end counted, and whether
        greedy decoding would answer just that.

        A loss where the name says likelihood: lmms-eval takes the choice with the smallest value, because this is what
        its own models return.
        """
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for _, places in self._batches(requests, "reading"):
            read = []
            for place in places:
                text, target, to_visual, *where = requests[place].args
                document = self._document(*where)
                (turns, images), answer = from_text(text, to_visual(document)), target
                if callable(target):
                    answer = target(document)
                read.append(([*turns, ("assistant", answer)], images, str(where)))
            counts, seen = self._look([images for _, images, _ in read])
            examples = [
                self.processor.encode(turns, images, sample_id=name, token_counts=own)
                for (turns, images, name), own in zip(read, counts, strict=True)
            ]
            inputs = self.processor.pad([example.input_ids_S for example in examples])
            labels_BL = torch.stack([_left(example.labels_S, inputs["input_ids"].shape[1]) for example in examples])
            mask_BL = inputs["attention_mask"].to(self.device)
            kept = 1 + max(int((labels_S != IGNORE_INDEX).sum()) for labels_S in labels_BL)  # rows end with the answer
            logits_BLD = self.model(
                input_ids=inputs["input_ids"].to(self.device), attention_mask=mask_BL,
                position_ids=(mask_BL.cumsum(1) - 1).clamp(min=0), logits_to_keep=kept, use_cache=False,
                **seen,
            ).logits[:, :-1]  # fmt: skip
            for place, logits_LD, labels_L in zip(places, logits_BLD, labels_BL[:, 1 - kept :], strict=True):
                at_L = labels_L != IGNORE_INDEX
                logits_QD, targets_Q = logits_LD[at_L].float(), labels_L[at_L].to(self.device)
                loss = cross_entropy(logits_QD, targets_Q).item()
                found[place] = loss, bool((logits_QD.argmax(-1) == targets_Q).all())
        return found

    def _asked(self, arguments: tuple[Any, ...]) -> Asked:
        text, _, to_visual, *_, number, task, split = arguments
        return from_text(text, to_visual(self._document(number, task, split)) if to_visual else None)

    def _next(self, arguments: tuple[Any, ...], number: int, said: list[str], memory: Any) -> Round:
        _, _, _, to_text, *where = arguments
        visuals, text, is_over, said, memory = to_text(
            self._document(*where), previous_output=said, round_idx=number, previous_round_info=memory
        )
        return None if is_over else from_text(text, visuals), list(said), memory

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _options(self, arguments: tuple[Any, ...]) -> Mapping[str, Any]:
        return arguments[1] if isinstance(arguments[1], Mapping) else {}

    def _batches(self, requests: Sequence[Instance], verb: str) -> Iterator[tuple[Decoding, Sequence[int]]]:
        """Places of requests that are decoded alike, at most `batch_size` at once."""
        alike: dict[str, tuple[Mapping[str, Any], list[int]]] = {}
        for place, request in enumerate(requests):
            options = self._options(request.args)
            alike.setdefault(json.dumps(options, sort_keys=True, default=str), (options, []))[1].append(place)
        with tqdm(total=len(requests), desc=verb, unit=" questions", delay=2, disable=self.rank != 0) as bar:
            for options, places in alike.values():
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    yield Decoding.read(options), batch
                    bar.update(len(batch))

    def _look(self, images: Sequence[Sequence[Image.Image]]) -> tuple[list[list[tuple[int, ...]]], dict[str, Tensor]]:
        """For each question the embeddings of its images' views, and what the model is told of all images."""
        looks = look(Greedy(self.model), self.processor, [image for own in images for image in own])
        left = iter(looks)
        counts = [[next(left).counts for _ in own] for own in images]
        return counts, {"image_embeds": torch.cat([each.embeds for each in looks])} if looks else {}

    @torch.no_grad()
    def _answers(self, asked: Sequence[Asked], decoding: Decoding) -> list[str]:
        counts, seen = self._look([item.images for item in asked])
        inputs = self.processor.pad([
            self.processor.prompt(item.turns, item.images, token_counts=own)
            for item, own in zip(asked, counts, strict=True)
        ])  # fmt: skip
        tokenizer = self.processor.tokenizer
        stops = {"stop_strings": list(decoding.until), "tokenizer": tokenizer} if decoding.until else {}
        ids_BL = self.model.generate(
            **inputs.to(self.device), **seen, **decoding.arguments, **stops, eos_token_id=self.processor.stop_token_ids
        )
        new_BL = ids_BL[:, inputs["input_ids"].shape[1] :]
        return [decoding.cut(text) for text in tokenizer.batch_decode(new_BL, skip_special_tokens=True)]


class AnchorFormerChat(AnchorFormerSimple):
    """The same, asked in messages; lmms-eval has no losses in this form."""

    is_simple = False

    def _asked(self, arguments: tuple[Any, ...]) -> Asked:
        _, to_messages, _, *where = arguments
        return Asked(*read_messages(to_messages(self._document(*where))))

    def _next(self, arguments: tuple[Any, ...], number: int, said: list[str], memory: Any) -> Round:
        _, to_messages, _, *where = arguments
        messages, is_over, said, memory = to_messages(
            self._document(*where), round_idx=number, previous_output=said, previous_round_info=memory
        )
        return None if is_over else Asked(*read_messages(messages)), list(said), memory

    def _options(self, arguments: tuple[Any, ...]) -> Mapping[str, Any]:
        return arguments[2] or {}


def _device(wanted: str | None) -> torch.device:
    """
    Raises:
        UserError: a GPU is asked for where there is none.
    """
    name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA device here", found=f"device={name}", expected="a visible GPU", remedy="set device=cpu"
        )
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


def _left(labels_S: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(labels_S, (length - labels_S.shape[0], 0), value=IGNORE_INDEX)
