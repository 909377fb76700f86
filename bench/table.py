"""What a benchmark run leaves behind: rows with machine, versions, commit and command, as JSON, text or Markdown."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
"""Raised whenever a reader of older files would misread them."""

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "liger-kernel", "flash-attn", "numpy", "pillow")
"""Whose versions a result depends on; those that are not installed are null in the file."""

ROOT = Path(__file__).parent.parent


class Sheet:
    """The rows of one run. A file, where one is given, is whole after every row: a run that is cut off keeps its rows.

    Args:
        benchmark: name of the command, as `cpu` or `gpu-step`.
        path: the JSON file.
        facts: what belongs to the whole run (ceilings, settings); more may be put into `facts` at any time.
    """

    def __init__(self, benchmark: str, path: Path | None = None, facts: Mapping[str, Any] | None = None) -> None:
        self.path, self.rows = path, list[dict[str, Any]]()
        self.facts: dict[str, Any] = dict(facts or {})
        self._head = {"format": FORMAT, "benchmark": benchmark, "command": _command(), **environment()}

    def add(self, row: Mapping[str, Any]) -> None:
        """Keeps a row: numbers, text, booleans, None, and lists of these."""
        self.rows.append(dict(row))
        self.write()

    def write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_name(self.path.name + ".tmp")
            draft.write_text(json.dumps({**self._head, "facts": self.facts, "rows": self.rows}, indent=1) + "\n")
            os.replace(draft, self.path)


def read(path: Path) -> dict[str, Any]:
    """A sheet's file.

    Raises:
        ValueError: it was written in another format.
    """
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has format {content.get('format')}, this program reads {FORMAT}")
    return content


def environment() -> dict[str, Any]:
    """Machine, versions, commit and time, as every result needs them."""
    cuda = torch.cuda.is_available()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if cuda else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Columns under their names, numbers to the right."""
    cells = [list(columns), *([show(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    right = [any(isinstance(row.get(column), int | float) for row in rows) for column in columns]

    def align(line: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ).rstrip()

    return "\n".join(map(align, cells))


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The same as a Markdown table."""
    lines = [columns, ["---"] * len(columns), *([show(row.get(column)) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(value: Any) -> str:
    """Three digits that count for numbers, yes and no for booleans, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def short_commit(commit: str) -> str:
    """The head of a commit, and the `+` of one whose files had changes."""
    return commit[:12] + "+" * (len(commit) > 12 and commit.endswith("+"))


def _command() -> str:
    module = sys.modules["__main__"].__spec__
    name = module.name.removesuffix(".__main__") if module else sys.argv[0]
    return shlex.join(["python", *(["-m"] if module else []), name, *sys.argv[1:]])


def _commit() -> str | None:
    """The checked out commit, `+` behind it where tracked files differ; None outside a clone."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)  # noqa: S607

    try:
        head = git("rev-parse", "HEAD")
    except FileNotFoundError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if git("status", "--porcelain", "-uno").stdout.strip() else "")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
