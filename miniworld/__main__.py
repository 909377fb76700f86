"""`python -m miniworld`: builds the mini world of a budget, or says that it is there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from anchorformer.errors import UserError
from miniworld.config import BUDGETS, MiniWorldConfig


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m miniworld", description=__doc__)
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="train", help="how much is made and trained")
    parser.add_argument("--out", type=Path, default=Path(".cache/miniworld"), help="result lands in OUT/BUDGET")
    parser.add_argument("--seed", type=int, default=0, help="of the backbones; the world stays the same")
    parser.add_argument("--clip-steps", type=int, help="instead of the budget's")
    parser.add_argument("--llama-steps", type=int, help="instead of the budget's")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    # The heavy imports come after the arguments are known to be good.
    from miniworld.build import MANIFEST, build

    try:
        folder = build(_config(given), given.out / given.budget)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    report = json.loads((folder / MANIFEST).read_text())
    print(json.dumps({name: report[name] for name in ("seconds", "clip", "llama")}, indent=1))
    print(folder)
    return 0


def _config(given: argparse.Namespace) -> MiniWorldConfig:
    config = BUDGETS[given.budget]
    clip = dataclasses.replace(config.clip, seed=given.seed, steps=given.clip_steps or config.clip.steps)
    llama = dataclasses.replace(config.llama, seed=given.seed, steps=given.llama_steps or config.llama.steps)
    return dataclasses.replace(config, clip=clip, llama=llama)


if __name__ == "__main__":
    sys.exit(main())
