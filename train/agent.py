"""torchrun with the exit code of the rank that failed first, and one line about it in place of a traceback.

`python -m train.agent` takes torchrun's own arguments, the last one a run folder. torchrun itself ends with 1 whatever
its ranks ended with, so that a user's mistake (2), a halted run (3) and a crash could not be told apart.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from train.folder import RunFolder

ELASTIC = "torch.distributed.elastic"


def main(arguments: list[str]) -> int:
    """Runs this node's ranks to their end.

    Returns:
        0; what HALTED.json says, where the ranks left one; else the exit code of the rank that failed first, or 128 +
        the signal that ended it or this process.
    """
    folder = RunFolder(Path(arguments[-1]))
    _hush(folder)
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        if folder.halted.is_file():
            # The ranks have said why; one that lost its peers meanwhile may have ended first, with another code.
            return int(json.loads(folder.halted.read_text())["exit_code"])
        rank, failure = error.get_first_failure()
        print(f"rank {rank} ended first, with {failure.exitcode}: see {folder.log(rank)}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        print(f"stopped by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval.value
    return 0


def _hush(folder: RunFolder) -> None:
    """Keeps torchrun's own account of the ranks' end to itself where they have left theirs."""

    def is_news(_: logging.LogRecord) -> bool:
        return not folder.halted.is_file()

    # A filter counts for its own logger only, not for those below it.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith(ELASTIC)]:
        logging.getLogger(name).addFilter(is_news)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
