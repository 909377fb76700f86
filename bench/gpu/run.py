"""`python -m bench.gpu.run FOLDER`: what a short real run on one or more cards came to, from its metrics.jsonl."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from anchorformer.errors import UserError, run_guarded
from bench.table import Sheet, text
from train.observe.journal import read_lines
from train.run.folder import RunFolder

COLUMNS = ("run", "steps", "step_s", "samples_s", "tokens_s", "mfu", "data_wait", "padding", "peak_gib")


def summary(folder: Path, warm_up: int) -> dict[str, float | int | str | None]:
    """Medians over the steps after the first `warm_up`; rates are over all ranks.

    Raises:
        UserError: fewer steps than that.
    """
    records = [json.loads(line) for line in read_lines(RunFolder(folder).metrics)][warm_up:]
    if not records:
        raise UserError(
            f"{folder} has no steps to look at", found=f"at most {warm_up} in {RunFolder(folder).metrics}",
            expected=f"more than {warm_up}", remedy="let it run longer, or lower --warm-up",
        )  # fmt: skip
    times = [record["time"] for record in records]
    shares = [time["mfu"] for time in times if "mfu" in time]
    return {
        "run": folder.name, "steps": len(records),
        "step_s": statistics.median(time["seconds"] for time in times),
        "samples_s": statistics.median(time["samples_per_second"] for time in times),
        "tokens_s": statistics.median(time["tokens_per_second"] for time in times),
        "mfu": statistics.median(shares) if shares else None,
        "data_wait": statistics.median(time["data_wait_seconds"] / time["seconds"] for time in times),
        "padding": statistics.median(record["padding_share"] for record in records),
        "peak_gib": max(time["peak_memory_gib"] for time in times),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="python -m bench.gpu.run", description=__doc__)
    options.add_argument("folders", type=Path, nargs="+", help="run folders")
    options.add_argument("--warm-up", type=int, default=5, help="steps left out at the start (default: 5)")
    options.add_argument("--json", type=Path, help="file for the rows")
    parsed = options.parse_args(arguments)
    sheet = Sheet("gpu-run", parsed.json, {"warm_up": parsed.warm_up})
    for folder in parsed.folders:
        sheet.add(summary(folder, parsed.warm_up))
    print(text(sheet.rows, COLUMNS))


if __name__ == "__main__":
    run_guarded(main)
