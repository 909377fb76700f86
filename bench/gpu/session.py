"""One run of a command on one device: its options, its time budget, and its rows, kept and shown as they come."""

from __future__ import annotations

import argparse
import logging
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anchorformer.errors import UserError
from bench import lengths
from bench.gpu.shapes import Scale, published_scale, tiny_scale
from bench.gpu.timing import GB, Budget, copy_ceiling, matmul_ceiling, release
from bench.table import Sheet, show

Columns = dict[str, Any]
OUT_OF_MEMORY = "out of memory"


def parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all three commands share."""
    options = argparse.ArgumentParser(prog=f"python -m bench {command}", description=description)
    options.add_argument("--json", type=Path, help="file for the rows; whole after every row")
    options.add_argument("--minutes", type=float, default=8.5, help="time budget (default: 8.5)")
    options.add_argument("--commit", help="of the measured tree, where it is copied without its .git")
    options.add_argument("--lengths", type=Path, default=lengths.FILE, help="JSON with lengths of real samples")
    options.add_argument("--tiny", action="store_true", help="toy shapes on the CPU: shows that the code runs")
    return options


class Session:
    """
    Args:
        command: name of the command.
        options: parsed by `parser`.

    Raises:
        UserError: no CUDA device, and not `--tiny`.
    """

    def __init__(self, command: str, options: argparse.Namespace) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        if not options.tiny and not torch.cuda.is_available():
            raise UserError(
                f"{command} measures a CUDA device", found="none", expected="one card with CUDA",
                remedy="run it on a machine with a card, or with --tiny to see that the code runs",
            )  # fmt: skip
        self.budget = Budget(60 * options.minutes)
        self.scale: Scale = tiny_scale() if options.tiny else published_scale()
        self.lengths: Path = options.lengths
        self.tiny: bool = options.tiny
        self.left_out: str | None = None
        """Why the last row was left out; None where it was not."""
        self._errors: list[Exception] = []
        facts = {"tiny": options.tiny, "budget_minutes": options.minutes, "weights": "random"}
        if options.commit:
            facts["commit"] = options.commit
        self.sheet = Sheet(command, options.json, facts)
        print(f"{command} on {self.scale.name}, torch {torch.__version__}, at most {options.minutes:g} minutes")

    @property
    def compiler(self) -> str:
        """torch.compile's backend; toys on the CPU only show that the code can be captured."""
        return "inductor" if self.scale.device.type == "cuda" else "eager"

    def measure_ceilings(self) -> None:
        """Measures what the card can do at best and keeps it as facts."""
        self.matmul_flops = flops = matmul_ceiling(self.scale.device, self.scale.matmul_side)
        copied = copy_ceiling(self.scale.device, self.scale.copy_bytes)
        ceilings = {"matmul_tflops": flops / 1e12, "copy_tb_s": copied / 1e12}
        self.sheet.facts.update(ceilings)
        self.sheet.write()
        print(f"ceilings: {_line(ceilings)}")
        release(self.scale.device)

    def row(self, labels: Mapping[str, Any], seconds: float, measure: Callable[[], Columns]) -> Columns | None:
        """Measures a row, keeps and prints it; None where it was left out, which the row says with its reason.

        Args:
            seconds: about how long it takes.
        """
        found = self.rows(labels, seconds, lambda: [measure()])
        return found[0] if found else None

    def rows(self, labels: Mapping[str, Any], seconds: float, measure: Callable[[], list[Columns]]) -> list[Columns]:
        """The same for several rows that come out of one measurement; none where they were left out."""
        found: list[Columns] = []
        left_out: str | None = None
        if not self.budget.allows(seconds):
            left_out = f"time budget: {self.budget.spent:.0f} s spent, about {seconds:.0f} s needed"
        else:
            try:
                found = measure()
            except torch.OutOfMemoryError:
                left_out = OUT_OF_MEMORY
            except Exception as error:  # noqa: BLE001 (a loan is too short to lose the rows behind a failing one)
                traceback.print_exc()
                traceback.clear_frames(error.__traceback__)  # they hold on to tensors
                self._errors.append(error)
                left_out = f"failed: {type(error).__name__}: {str(error)[:200]}"
        self.left_out = left_out
        release(self.scale.device)
        for columns in found or [{}]:
            row = {**labels, **columns, "left_out": left_out}
            self.sheet.add(row)
            print(f"[{self.budget.spent:4.0f} s] {_line(row)}", flush=True)
        return found

    def close(self) -> None:
        """
        Raises:
            ExceptionGroup: rows failed; all others have been measured.
        """
        self.sheet.facts["seconds"] = self.budget.spent
        self.sheet.write()
        if self._errors:
            raise ExceptionGroup(f"{len(self._errors)} row(s) failed", self._errors)


def relative_error(got: Tensor, reference: Tensor) -> float:
    """|got - reference| / |reference| over the whole tensor, in fp32."""
    got, reference = got.detach().float(), reference.detach().float()
    return float(torch.linalg.vector_norm(got - reference) / torch.linalg.vector_norm(reference))


def allocated_gb(device: torch.device) -> float | None:
    return torch.cuda.memory_allocated() / GB if device.type == "cuda" else None


def _line(row: Mapping[str, Any]) -> str:
    return "  ".join(f"{name}={show(value)}" for name, value in row.items() if value is not None)
