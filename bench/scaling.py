"""`python -m bench scaling`: how even a step is when its samples are dealt to many ranks, simulated without them.

Every step goes through the trainer's own order and dealing; its FLOPs are not computed but added up, rank by rank.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu.shapes import plan_shapes, published_scale
from bench.lengths import FILE, MAX_LENGTH, mixture
from bench.packing import TRAINS
from bench.runner import cpu_seconds
from bench.table import Sheet, text
from data.sampler import plan_step
from train.plan.dealing import Lengths, deal, read_lengths

RANKS, PER_RANK = (8, 64, 512), (1, 2, 4, 8, 16)
COLUMNS = ("lengths", "ranks", "global_batch", "per_rank", "micro_batches", "useful", "slowest", "dealing_ms")


def rows(
    ranks: Sequence[int], per_rank: Sequence[int], budget: int | None, micro_batch: int
) -> Iterator[dict[str, Any]]:
    """One row for each number of ranks and of samples that each of them has of a step.

    Args:
        budget: most positions of a micro-batch.
        micro_batch: most samples of one.
    """
    shapes = plan_shapes(published_scale(), "anchor_former")
    assumed = mixture(16384)
    for name, lengths in (
        ("real", read_lengths(FILE)), ("mixture", Lengths(assumed.text, assumed.images, assumed.supervised)),
    ):  # fmt: skip
        works = lengths.works(shapes, MAX_LENGTH, tiles=1.0)
        positions = [int(work.positions) for work in works]
        for count in ranks:
            for each in per_rank:
                dealt = deal(
                    works, shapes, TRAINS, ranks=count, global_batch=count * each, micro_batch=micro_batch,
                    budget=budget,
                )  # fmt: skip
                step = [positions[number % len(positions)] for number in range(count * each)]
                seconds = cpu_seconds({"deal": partial(plan_step, step, count, micro_batch, budget)}, repeats=3)
                yield {
                    "lengths": name, "ranks": count, "global_batch": count * each, "per_rank": each,
                    "micro_batches": dealt.micro_batches, "useful": dealt.useful, "slowest": dealt.slowest,
                    "dealing_ms": seconds["deal"] * 1e3,
                }  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench scaling", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"""{__doc__}
useful: share of all ranks' arithmetic that is done while the slowest does its own, micro-batch by micro-batch
slowest: arithmetic of a step's slowest rank over that of a mean one
dealing_ms: CPU time in which a rank finds out who computes what in one step
""",
    )  # fmt: skip
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--per-rank", type=int, nargs="+", default=PER_RANK, help="samples of a step that a rank has")
    parser.add_argument("--budget", type=int, help="most positions of a micro-batch (default: no limit)")
    parser.add_argument("--micro-batch", type=int, default=64, help="most samples of a micro-batch (default: 64)")
    parser.add_argument("--json", type=Path, help="file for the rows, with machine, versions and commit")
    options = parser.parse_args(arguments)
    sheet = Sheet("scaling", options.json, {"budget": options.budget, "micro_batch": options.micro_batch})
    for row in rows(options.ranks, options.per_rank, options.budget, options.micro_batch):
        sheet.add(row)
    print(text(sheet.rows, COLUMNS))
