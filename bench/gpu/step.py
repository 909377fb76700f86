"""`bench gpu-step`: whole training steps of both stages at 7B on one card, beside the baselines; the first token."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anchorformer.errors import run_guarded
from anchorformer.lean import make_lean
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from bench.gpu.as_published import collate_padded, padded_loss
from bench.gpu.emulate import BUCKETS, NOT_INCLUDED, EmulatedRank, checkpoint_layers, run_step
from bench.gpu.first_token import first_token
from bench.gpu.kernels import kernel_rows
from bench.gpu.session import OUT_OF_MEMORY, Columns, Session, allocated_gb, parser
from bench.gpu.shapes import (
    CONNECTORS,
    Length,
    Scale,
    build_language_model,
    build_model,
    make_examples,
    plan_shapes,
    stage_config,
)
from bench.gpu.timing import GB, release, synchronize
from data.collate import collate
from train.config import ZeroConfig
from train.loss import supervised_loss
from train.plan.cards import card_of_device
from train.plan.flops import Work, model_flops
from train.plan.memory import Layout, MicroBatch, rank_memory

TEXT = {1: Length(text=18, supervised=17), 2: Length(text=190, supervised=110)}
"""A caption of LLaVA-558k, and a conversation of LLaVA-665k at the short end of the range that plans assume."""
WARM_UP, TIMED = 2, 6
USABLE = 0.93
"""Share of the card's memory that the search for the largest batch aims at; the rest is lost between blocks."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row: a model, a stage and a batch.

    Attributes:
        tiles: images of 336 pixels per sample; 1, 4 and 9 are what 336, 672 and 1008 pixels come to.
        as_llava: activation checkpointing, all logits and the padded form, instead of ours.
    """

    stage: int
    connector: str
    tiles: int
    batch: int
    as_llava: bool = False

    @property
    def labels(self) -> dict[str, Any]:
        return {
            "what": "training step", "variant": "as LLaVA" if self.as_llava else "ours", "stage": self.stage,
            "connector": self.connector, "tiles": self.tiles, "batch": self.batch,
        }  # fmt: skip

    @property
    def lengths(self) -> list[Length]:
        return [replace(TEXT[self.stage], images=self.tiles)] * self.batch


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("gpu-step", __doc__)
    options.add_argument("--stages", default="1,2")
    options.add_argument("--connectors", default=",".join(CONNECTORS))
    options.add_argument("--tiles", default="1,4,9")
    options.add_argument("--bs", default="4", help="samples per step, comma-separated (default: 4)")
    options.add_argument("--bs-max", choices=("auto", "off"), default="auto", help="also the largest that fits, 1 tile")
    options.add_argument("--kernels", action="store_true", help="also where the time of AnchorFormer's steps goes")
    options.add_argument("--ranks", type=int, default=8, help="ZeRO-2 ranks of which one is emulated (default: 8)")
    parsed = options.parse_args(arguments)
    session = Session("gpu-step", parsed)
    session.sheet.facts |= {"ranks": parsed.ranks, "not_included": NOT_INCLUDED, "warm_up": WARM_UP, "timed": TIMED}
    print(f"one of {parsed.ranks} ZeRO-2 ranks, {NOT_INCLUDED} not included")
    session.measure_ceilings()
    Steps(session, parsed).measure()
    session.close()


class Steps:
    """All rows, around one language model."""

    def __init__(self, session: Session, options: argparse.Namespace) -> None:
        self.session, self.scale, self.options = session, session.scale, options
        self.stages = [int(stage) for stage in options.stages.split(",")]
        self.connectors = options.connectors.split(",")
        self.tiles = [int(tiles) for tiles in options.tiles.split(",")]
        self.batches = [int(batch) for batch in options.bs.split(",")]

    def measure(self) -> None:
        """The rows that targets are set for come first, in case the time runs out."""
        language_model = build_language_model(self.scale)
        make_lean(language_model)
        for connector in sorted(self.connectors, key=lambda name: name != "anchor_former"):
            model = build_model(self.scale, connector, language_model)
            if connector == "anchor_former":
                first_token(self.session, model)
            for stage in self.stages:
                for batch in self.batches:
                    for tiles in self.tiles:
                        self._row(model, Cell(stage=stage, connector=connector, tiles=tiles, batch=batch))
                if self.options.kernels and connector == "anchor_former":
                    for batch in (4, 16):
                        self._kernels(model, Cell(stage=stage, connector=connector, tiles=1, batch=batch))
                if self.options.bs_max == "auto":
                    self._largest(model, Cell(stage=stage, connector=connector, tiles=1, batch=1))
            del model
        del language_model
        release(self.scale.device)

        plain = build_language_model(self.scale)
        for connector in self.connectors:
            if connector == "anchor_former":
                continue
            model = build_model(self.scale, connector, plain)
            for stage in self.stages:
                for tiles in self.tiles:
                    cell = Cell(stage=stage, connector=connector, tiles=tiles, batch=self.batches[0], as_llava=True)
                    self._row(model, cell)
            del model

    def _row(self, model: AnchorFormerForConditionalGeneration, cell: Cell) -> Columns | None:
        measure = partial(measure_cell, self.session, model, cell, self.options.ranks)
        return self.session.row(cell.labels, self._seconds(cell), measure)

    def _kernels(self, model: AnchorFormerForConditionalGeneration, cell: Cell) -> None:
        def profiled() -> list[Columns]:
            with prepared(self.session, model, cell, self.options.ranks) as step:
                return kernel_rows(step, self.scale.device)

        self.session.rows({**cell.labels, "what": "kernels of a step"}, self._seconds(cell), profiled)

    def _seconds(self, cell: Cell) -> float:
        """About how long a row takes, at three tenths of what the card can do."""
        flops = useful_flops(self.scale, cell) * (4 / 3 if cell.as_llava else 1)
        return 4 + (WARM_UP + TIMED) * flops / (0.3 * self.session.matmul_flops)

    def _largest(self, model: AnchorFormerForConditionalGeneration, cell: Cell) -> None:
        """The largest batch that fits: aimed at through two smaller ones, then less until it does."""
        if self.scale.device.type != "cuda":
            return
        reserved = {}
        for batch in (8, 24):
            columns = self._row(model, replace(cell, batch=batch))
            if columns is None:
                return
            reserved[batch] = columns["reserved_gb"]
        total = torch.cuda.get_device_properties(self.scale.device).total_memory / GB
        per_sample = (reserved[24] - reserved[8]) / 16
        batch = 24 + int((USABLE * total - reserved[24]) / per_sample)
        while batch > 24:
            if self._row(model, replace(cell, batch=batch)) is not None or self.session.left_out != OUT_OF_MEMORY:
                return
            batch = int(batch * 0.92)


@contextmanager
def prepared(
    session: Session, model: AnchorFormerForConditionalGeneration, cell: Cell, ranks: int
) -> Iterator[Callable[[], Tensor]]:
    """The cell's step, ready to be called: forward, backward and the rank's optimizer; gives the loss on the device."""
    device = session.scale.device
    model.train()
    checkpoint_layers(model, on=cell.as_llava)
    rank = EmulatedRank(model, stage_config(cell.stage), ranks)
    try:
        examples = make_examples(model, cell.lengths)
        batch: Any = collate_padded(examples) if cell.as_llava else collate(examples)
        held = batch.pin_memory() if device.type == "cuda" else batch
        supervised = sum(length.supervised for length in cell.lengths)

        def loss() -> Tensor:
            if cell.as_llava:
                return padded_loss(model, held.to(device), supervised, all_logits=True)
            return supervised_loss(model, held.to(device), supervised)

        yield lambda: run_step(rank, [loss])
    finally:
        rank.close()
        model.zero_grad(set_to_none=True)


def measure_cell(session: Session, model: AnchorFormerForConditionalGeneration, cell: Cell, ranks: int) -> Columns:
    """Time and memory of one rank's step."""
    with prepared(session, model, cell, ranks) as step:
        fixed_gb = allocated_gb(session.scale.device)
        seconds, loss = time_steps(step, session)
    median, found = statistics.median(seconds), peaks(session.scale.device)
    return {
        "step_ms": 1e3 * median, "samples_s": cell.batch / median,
        **expected(session, cell, ranks, median, found),
        "fixed_gb": fixed_gb, **found, "low_ms": 1e3 * min(seconds), "high_ms": 1e3 * max(seconds), "loss": loss,
    }  # fmt: skip


def expected(session: Session, cell: Cell, ranks: int, step: float, found: Columns) -> Columns:
    """What the plan says of this step beside what was found: arithmetic per second, and memory with its error."""
    shapes, trains = plan_shapes(session.scale, cell.connector), stage_config(cell.stage).trains
    flops, length = useful_flops(session.scale, cell), cell.lengths[0]
    positions = sum(length.positions(shapes.connector.queries) for length in cell.lengths)
    layout = Layout(
        ranks=ranks, zero=2, value_bytes=session.scale.dtype.itemsize, checkpointing=cell.as_llava,
        bucket=ZeroConfig().bucket_size, buckets=BUCKETS, lean=not cell.as_llava,
    )  # fmt: skip
    supervised = positions if cell.as_llava else cell.batch * length.supervised
    batch = MicroBatch(positions=positions, supervised=supervised, images=cell.batch * cell.tiles)
    predicted = rank_memory(shapes, trains, layout, batch).allocated / GB
    card = card_of_device(session.scale.name)
    return {
        "positions": positions, "tokens_s": positions / step, "tflop": flops / 1e12,
        "mfu": flops / step / (card.peak_tflops * 1e12) if card else None,
        "mfu_of_ceiling": flops / step / session.matmul_flops,
        "predicted_gb": predicted,
        "prediction_error": predicted / found["peak_gb"] - 1 if found["peak_gb"] else None,
    }  # fmt: skip


def useful_flops(scale: Scale, cell: Cell) -> float:
    """Of one step, by the plan's accounting: what is computed twice counts once."""
    shapes, length = plan_shapes(scale, cell.connector), cell.lengths[0]
    sample = Work.of_sample(shapes, text=length.text, supervised=length.supervised, images=length.images)
    return cell.batch * sum(model_flops(shapes, stage_config(cell.stage).trains, sample).values())


def time_steps(step: Callable[[], Tensor], session: Session) -> tuple[list[float], float]:
    """Wall seconds of the timed steps, each waited for as a training loop does, and the last loss."""
    device = session.scale.device
    warm_up, timed = (1, 1) if session.tiny else (WARM_UP, TIMED)
    for _ in range(warm_up):
        step()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, value = [], float("nan")
    for _ in range(timed):
        started = time.perf_counter()
        value = float(step())
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    if not value < 1e4:
        raise ValueError(f"the step's loss is {value}: what was measured is not a training step")
    return seconds, value


def peaks(device: torch.device) -> Columns:
    """Most memory allocated and reserved since the last reset."""
    if device.type != "cuda":
        return {"peak_gb": None, "reserved_gb": None}
    return {
        "peak_gb": torch.cuda.max_memory_allocated() / GB, "reserved_gb": torch.cuda.max_memory_reserved() / GB,
    }  # fmt: skip


if __name__ == "__main__":
    run_guarded(main)
