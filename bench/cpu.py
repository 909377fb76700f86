"""`python -m bench cpu`: every measure that a CPU can show, published and ours side by side in one process."""

from __future__ import annotations

import argparse
import gc
import importlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from bench.runner import Size
from bench.table import Sheet, text

SECTIONS = (
    "selection", "packing", "loader", "head", "attention", "activations", "connector", "vision", "records", "step",
)  # fmt: skip
"""Modules with `rows(size)`, the cheap ones first."""

COLUMNS = ("name", "unit", "old", "new", "ratio", "goal_ratio", "goal", "met", "equal")


def main(arguments: Sequence[str]) -> int:
    """Runs the sections; 1 where two results that have to be equal are not. A missed goal is shown, not an error."""
    parser = argparse.ArgumentParser(prog="python -m bench cpu", description=__doc__)
    parser.add_argument("--full", action="store_true", help="whole models and steps too (20 minutes instead of 3)")
    parser.add_argument(
        "--tiny", action="store_true", help="toy shapes: checks the comparisons, its times mean nothing"
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="comma-separated sections (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--json", type=Path, help="file for the rows, with machine, versions and commit")
    options = parser.parse_args(arguments)
    unknown = set(options.only.split(",")) - set(SECTIONS)
    if unknown or (options.full and options.tiny):
        parser.error(f"unknown sections: {sorted(unknown)}" if unknown else "--full and --tiny exclude each other")
    size = Size.full if options.full else Size.tiny if options.tiny else Size.quick
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    sheet = Sheet("cpu", options.json, {"size": size.value, "seconds": {}})
    sections = {name: importlib.import_module(f"bench.{name}") for name in options.only.split(",")}
    gc.freeze()  # the modules' own objects need not be looked at whenever a measurement cleans up
    for name, section in sections.items():
        begun = time.monotonic()
        for row in section.rows(size):
            sheet.add(row.to_dict())
            print(text([row.to_dict()], COLUMNS).splitlines()[1], flush=True)
        sheet.facts["seconds"][name] = round(time.monotonic() - begun, 1)
    gc.unfreeze()
    sheet.write()
    print("\n" + text(sheet.rows, COLUMNS))
    missed = [row["name"] for row in sheet.rows if row["met"] is False]
    wrong = [row["name"] for row in sheet.rows if row["equal"] is False]
    print(f"\n{len(sheet.rows)} rows in {sum(sheet.facts['seconds'].values()):.0f} s (wall); {size.value}", end="")
    print(f"; goals missed: {missed or 'none'}; not equal: {wrong or 'none'}")
    return 1 if wrong else 0
