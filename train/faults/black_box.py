"""What a rank leaves when it fails (where it was, on which samples, in how much memory), and who failed first."""

from __future__ import annotations

import json
import logging
import signal
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from anchorformer.errors import UserError
from anchorformer.schema import to_plain
from evals.memory import GIB, Memory
from train.faults.interrupt import Interrupted
from train.faults.progress import Progress, Report, read_reports
from train.run.environment import mask_values
from train.run.folder import RunFolder, write_atomically

log = logging.getLogger(__name__)

LOG_LINES = 40
STACK_LINES = 400
"""Of a log's end, in which the stacks of all threads have to be."""
TIMED_OUT = "Timeout ("
"""How `faulthandler` begins when its timer has run out; the process then ends with 1, which cannot be chosen."""
LOST = "lost its peers"
HUNG = "hung"
PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "DistBackendError",
    "NCCL error",
)
"""How a rank's collective ends when another rank is gone; what it leaves then is a consequence, not a cause."""


class BlackBox:
    """Guards a rank's run: an exception that leaves the block is described in `<run>/black_box/rank_<r>.json`.

    Attributes:
        config: hash of the run's configuration, once it is known.
        device: whose memory is described.
    """

    def __init__(self, folder: RunFolder, rank: int, progress: Progress) -> None:
        self._folder, self._rank, self._progress = folder, rank, progress
        self._path = folder.black_boxes / f"rank_{rank}.json"
        self.config = ""
        self.device = torch.device("cpu")

    def __enter__(self) -> BlackBox:
        self._folder.black_boxes.mkdir(parents=True, exist_ok=True)
        if self._path.is_file():
            # Of an earlier start: whoever looks for the first rank to fail must not find it among this one's.
            self._path.replace(self._path.with_name(f"before_rank_{self._rank}.json"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Interrupted):
            self.write(cause_of(error), str(error), "".join(traceback.format_exception(error)))

    def write(self, cause: str, message: str, stacks: str) -> None:
        """Describes this rank as it is now.

        Args:
            cause: one of the words of `cause_of`, or `HUNG`.
            stacks: where the rank's threads are.
        """
        try:
            facts = {
                "cause": cause, "message": mask_values(message), "time": time.time(), "config": self.config,
                **to_plain(Report.of(self._rank, self._progress.place)),
                "memory": _memory(self.device), "stacks": mask_values(stacks).splitlines(),
                "log": _last_lines(self._folder.log(self._rank), LOG_LINES),
                "ranks": [str(report) for report in read_reports(self._folder.black_boxes)],
            }  # fmt: skip
            write_atomically(self._path, json.dumps(facts, indent=1) + "\n")
        except Exception as error:  # noqa: BLE001 (whatever it is must not hide the failure that is being described)
            log.warning("no black box could be written: %r", error)


def cause_of(error: BaseException) -> str:
    """What ended a rank: `halted`, `refused`, `out of memory`, `lost its peers` or `crashed`."""
    if isinstance(error, UserError):
        return "refused" if error.exit_code == UserError.exit_code else "halted"
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return "out of memory"
    return LOST if any(words in text for words in PEER_IS_GONE) else "crashed"


def first_to_fail(folder: RunFolder, exit_codes: Mapping[int, int]) -> tuple[int, str]:
    """The rank whose failure made the others fail, and a line about it.

    Args:
        exit_codes: of this node's ranks that have ended; negative for a signal. At least one.
    """
    boxes = sorted(_read_boxes(folder), key=_time)
    causes = [box for box in boxes if box["cause"] != LOST]
    told = {box["rank"] for box in boxes}
    # A rank that was killed has left no box. By SIGTERM, or where others tell of a cause, it was the agent that did it.
    killed = [rank for rank, code in exit_codes.items() if code < 0 and code != -signal.SIGTERM and rank not in told]
    if killed and not causes:
        rank, number = killed[0], signal.Signals(-exit_codes[killed[0]])
        hint = " (the kernel does so when memory runs out)" if number is signal.SIGKILL else ""
        reports = [str(report) for report in read_reports(folder.black_boxes) if report.rank == rank]
        last_seen = f", last seen as {reports[0]}" if reports else ""
        return rank, f"rank {rank} was killed by {number.name}{hint}{last_seen}"
    silent = [rank for rank in exit_codes if rank not in told and _is_timed_out(folder.log(rank))]
    if silent and not causes:
        return silent[0], f"rank {silent[0]}: hung, and held the interpreter; its stacks are the end of its log"
    if boxes:
        box = (causes or boxes)[0]
        report = Report.parse({name: box[name] for name in Report.__dataclass_fields__})
        first_line = next(iter(box["message"].splitlines()), "no message")
        who = f"rank {report.rank}" if box["cause"] == HUNG else str(report)
        return report.rank, f"{who}: {box['cause']}: {first_line}"
    rank, code = next((item for item in exit_codes.items() if item[1] > 0), next(iter(exit_codes.items())))
    return rank, f"rank {rank}: ended with {code} before it could say why"


def _is_timed_out(log_file: Path) -> bool:
    """Whether the last thing that a rank's log has is the stacks that `faulthandler`'s timer has left."""
    lines = _last_lines(log_file, STACK_LINES)
    said = [line for line in lines if line.strip() and not line.startswith(("Thread ", "Current thread ", "  "))]
    return bool(said) and said[-1].startswith(TIMED_OUT)


def _read_boxes(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """Those that are whole: a rank may have been ended, or its disk been full, while it wrote one."""
    for path in folder.black_boxes.glob("rank_*.json"):
        try:
            yield json.loads(path.read_text())
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read: %s", path, error)


def _time(box: dict[str, Any]) -> float:
    return float(box["time"])


def _memory(device: torch.device) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = {"peak_gib": round(Memory.of(device).computing / GIB, 3)}
        if device.type == "cuda":
            facts["summary"] = torch.cuda.memory_summary(device, abbreviated=True).splitlines()
    except RuntimeError as error:
        # A device that has failed answers nothing any more; the rest is worth telling.
        return {"unknown": str(error)}
    return facts


def _last_lines(path: Path, count: int) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-count:] if path.is_file() else []
