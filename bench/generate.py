"""`python -m bench generate`: MLP, resampler and AnchorFormer asked about one image, at three sides, in one process.

The towers read the whole image at its side; all models share the weights of one language model. On a CPU they are
mid-size (ViT-B/14, 8 layers of a 7B Llama, bf16), on a GPU of the published size.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from anchorformer.modeling import AnchorFormerForConditionalGeneration
from bench.cpu import COLUMNS
from bench.gpu.shapes import (
    CONNECTORS,
    Length,
    Scale,
    build_language_model,
    build_model,
    image_tokens,
    make_examples,
    plan_shapes,
    published_scale,
    tiny_scale,
)
from bench.runner import Row, in_fresh_process, peak_bytes
from bench.step import mid_scale
from bench.table import Sheet, text
from train.plan.flops import Work, forward_flops

PROMPT = 60
"""Text positions of the question, its template included; the image comes on top."""
NEW = 9
"""Tokens of an answer; all but the first are decoded one by one."""
BASELINE = "mlp"
"""What the others are compared with: a token for every patch."""
REACHED = 0.85
"""Share of the FLOP ratio that the time to the first token has to reach."""
NAMES = {"mlp": "MLP", "resampler": "resampler", "anchor_former": "AnchorFormer"}

Figures = dict[str, float]
"""Kind of model -> a number."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench generate", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="toy shapes: shows that it runs, its times mean nothing")
    parser.add_argument("--sides", type=int, nargs="+", help="of the image in pixels (default: 336 672 1008)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, the least of which counts (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--json", type=Path, help="file for the rows, with machine, versions and commit")
    options = parser.parse_args(arguments)
    if options.tiny and options.device == "cuda":
        parser.error("--tiny runs on the CPU")
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    scale = scale_of(options.device, tiny=options.tiny)
    scale = replace(scale, sides=tuple(options.sides or scale.sides))
    facts = {
        "size": "tiny" if options.tiny else "full", "text_positions": PROMPT, "new_tokens": NEW,
        "old": "the MLP at the same side",
    }  # fmt: skip
    sheet = Sheet("generate", options.json, facts)
    for row in rows(scale, options.repeats, goals=not options.tiny):
        sheet.add(row.to_dict())
        print(text([row.to_dict()], COLUMNS).splitlines()[1], row.note, sep="  ", flush=True)
    print("\n" + text(sheet.rows, COLUMNS))
    print(f"\ngoals missed: {[row['name'] for row in sheet.rows if row['met'] is False] or 'none'}")


def scale_of(device: str, *, tiny: bool) -> Scale:
    if device == "cuda":
        return published_scale()
    if tiny:
        return replace(tiny_scale(), sides=(28, 56, 84))
    mid = mid_scale()
    # The MLP's 5,184 tokens of the largest side are more than the 4,096 positions of the published configuration.
    return replace(mid, sides=(336, 672, 1008), text={**mid.text, "max_position_embeddings": 8192})


def rows(scale: Scale, repeats: int, *, goals: bool) -> Iterator[Row]:
    """For each side and each model: time to first token, tokens per second behind it, memory; the MLP's as `old`."""
    memory = in_fresh_process(_peaks, scale) if _on_cpu(scale) else {}
    language_model = build_language_model(scale)
    for side in scale.sides:
        asked = [Asked(at(scale, side), kind, language_model) for kind in CONNECTORS]
        first, rate = measure(asked, repeats)
        peaks = memory.get(side) or {one.kind: one.cuda_peak() for one in asked}
        work = {one.kind: one.flops for one in asked}
        for one in asked:
            yield from _compared(one, side, first, rate, peaks, work, goals)
        del asked


def _compared(
    one: Asked, side: int, first: Figures, rate: Figures, peaks: Figures, work: Figures, goals: bool
) -> Iterator[Row]:
    kind = one.kind
    is_baseline = kind == BASELINE
    ratio = work[BASELINE] / work[kind]
    where = f"{side} pixels, {NAMES[kind]}, {one.image_tokens} visual tokens"
    note = f"{work[kind] / 1e12:.3g} TFLOP up to the first token"
    if not is_baseline:
        reached = first[BASELINE] / first[kind] / ratio
        note += f", FLOP ratio {ratio:.2f}, {reached:.0%} of it reached"
    yield Row(
        name=f"{where}: time to first token", unit="s", new=first[kind], old=None if is_baseline else first[BASELINE],
        goal_ratio=REACHED * ratio if goals and not is_baseline else None, note=note,
    )  # fmt: skip
    yield Row(
        name=f"{where}: tokens", unit="tokens/s", new=rate[kind], old=None if is_baseline else rate[BASELINE],
        note=f"behind the first, one by one, {NEW - 1} of them",
    )  # fmt: skip
    yield Row(
        name=f"{where}: peak memory", unit="MB", new=peaks[kind] / 1e6,
        old=None if is_baseline else peaks[BASELINE] / 1e6, note="of a whole answer beyond the weights",
    )  # fmt: skip


class Asked:
    """A model and its question: an image with a prompt behind it.

    Attributes:
        flops: up to the first token, as `train.plan` counts them.
    """

    def __init__(self, scale: Scale, kind: str, language_model: Any) -> None:
        self.kind, self._scale = kind, scale
        self._model: AnchorFormerForConditionalGeneration = build_model(scale, kind, language_model).eval()
        (example,) = make_examples(self._model, [Length(text=PROMPT, supervised=1)])
        self._ids, self._pixels = example.input_ids_S[None], example.tiles_B3HW
        self.image_tokens = image_tokens(self._model)
        positions = self._ids.shape[1]
        work = Work(positions=positions, squares=positions**2, supervised=1, images=1)
        self.flops = sum(forward_flops(plan_shapes(scale, kind), work).values())

    def answer(self) -> tuple[float, float]:
        """Seconds up to the first token, pixels and ids on the host included, and from there to the last one."""
        device = self._scale.device
        clock = _Clock(time.process_time if _on_cpu(self._scale) else time.perf_counter)
        self._model.generate(
            input_ids=self._ids.to(device), attention_mask=torch.ones_like(self._ids, device=device),
            pixel_values=self._pixels.to(device), do_sample=False, max_new_tokens=NEW, eos_token_id=None,
            pad_token_id=0, suppress_tokens=[self._model.image_token_id], streamer=clock,
        )  # fmt: skip
        begin, _, first, *_, last = clock.times
        return first - begin, last - first

    def cuda_peak(self) -> float:
        """Bytes on the card beyond what is there before an answer."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.answer()
        return float(torch.cuda.max_memory_allocated() - before)


class _Clock(BaseStreamer):
    """The time at its making, at the prompt and at each token, which is on the host by then."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.times = [now()]

    def put(self, value: Tensor) -> None:
        self.times.append(self._now())

    def end(self) -> None:
        """Nothing is held back."""


def measure(asked: Sequence[Asked], repeats: int) -> tuple[Figures, Figures]:
    """Least seconds to the first token, and most tokens per second behind it, of models that take turns.

    CPU seconds on a CPU, where the machine may have other work. A first round only warms up.
    """
    first = dict.fromkeys((one.kind for one in asked), float("inf"))
    rest = dict(first)
    gc.collect()
    for round_ in range(repeats + 1):
        for one in asked:
            to_first, to_last = one.answer()
            if round_:
                first[one.kind] = min(first[one.kind], to_first)
                rest[one.kind] = min(rest[one.kind], to_last)
    return first, {kind: (NEW - 1) / seconds for kind, seconds in rest.items()}


def at(scale: Scale, side: int) -> Scale:
    """The same with a tower that reads images of that side."""
    return replace(scale, vision={**scale.vision, "image_size": side})


def _on_cpu(scale: Scale) -> bool:
    return scale.device.type == "cpu"


def _peaks(scale: Scale) -> dict[int, Figures]:
    """Bytes of an answer by side, beyond what is there before."""
    language_model = build_language_model(scale)
    Asked(at(scale, min(scale.sides)), BASELINE, language_model).answer()  # fills caches that later answers find
    return {
        side: {
            kind: float(peak_bytes(Asked(at(scale, side), kind, language_model).answer, repeats=1))
            for kind in CONNECTORS
        }
        for side in scale.sides
    }
