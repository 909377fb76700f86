"""Several processes that answer shares of the same questions, each on its own card or its own cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from anchorformer.errors import UserError

POLL_SECONDS = 0.2


def run_shares(overrides: Sequence[str], ranks: int, num_cards: int) -> None:
    """Runs `python -m evals.worker` once per share and waits; the first one that fails ends the others.

    What has been answered until then is in the journals: the same command goes on from there.

    Args:
        num_cards: CUDA devices to be shared out, one for each; 0 shares out the cores.

    Raises:
        UserError: more shares than cards, or a worker that failed (it has said why).
    """
    if 0 < num_cards < ranks:
        raise UserError(
            "there are more ranks than cards", found=f"ranks={ranks}, {num_cards} visible CUDA device(s)",
            expected="at most one rank per card", remedy=f"set ranks={num_cards}",
        )  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "evals.worker", str(share), *overrides],
            env=environment(os.environ, share, ranks, num_cards),
        )
        for share in range(ranks)
    ]
    try:
        waiting = list(workers)
        while waiting:
            for worker in list(waiting):
                with suppress(subprocess.TimeoutExpired):
                    code = worker.wait(POLL_SECONDS)
                    waiting.remove(worker)
                    if code:
                        raise UserError(
                            f"rank {workers.index(worker)} of the evaluation failed", found=f"exit code {code}",
                            expected="answers to its share of the questions",
                            remedy="mend what it says above, and run the command again: nothing is asked twice",
                        )  # fmt: skip
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
        for worker in workers:
            worker.wait()


def environment(variables: Mapping[str, str], share: int, ranks: int, num_cards: int) -> dict[str, str]:
    """What a worker is started with: its card or its cores, and progress bars for the first one only."""
    if num_cards:
        visible = variables.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_cards)))
        own = {"CUDA_VISIBLE_DEVICES": visible.split(",")[share]}
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        own = {"OMP_NUM_THREADS": str(max(1, cores // ranks))}
    return {**variables, **own, **({} if share == 0 else {"TQDM_DISABLE": "1"})}
