"""A conversion that is killed at a place: `killed_conversion.py PLACE SIGNAL RUN_FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.checkpoint import reshape
from train.verbs import checkpoint as verb

CHILD, CONVERTED, SEALED, RENAMED = PLACES = ("child", "converted", "sealed", "renamed")
"""While DeepSpeed's converter has workers at work; behind it; behind COMPLETE; behind the rename."""


def plant(place: str, number: signal.Signals) -> None:
    """Has this process send itself the signal there."""
    convert, seal, sync = reshape.convert, reshape.seal.seal, reshape.sync_folder

    def end() -> None:
        os.kill(os.getpid(), number)

    def end_when_it_writes(folder: Path) -> None:
        while not any(folder.glob("**/*.pt")):
            time.sleep(0.005)
        end()

    def converted(source: Path, target: Path) -> None:
        if place == CHILD:
            threading.Thread(target=end_when_it_writes, args=[target], daemon=True).start()
        convert(source, target)
        if place == CONVERTED:
            end()

    def behind(at: str, done: Callable[..., None]) -> Callable[..., None]:
        def and_end(*arguments: Any) -> None:
            done(*arguments)
            if place == at:
                end()

        return and_end

    reshape.convert = converted
    reshape.seal.seal = behind(SEALED, seal)
    reshape.sync_folder = behind(RENAMED, sync)


if __name__ == "__main__":
    place, number, folder = sys.argv[1:]
    plant(place, signal.Signals[number])
    sys.exit(verb.main(["convert", folder]))
