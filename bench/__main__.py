"""`python -m bench COMMAND ...`: finds the command's module and runs it."""

from __future__ import annotations

import importlib
import sys

from anchorformer.errors import UserError, run_guarded

COMMANDS = {
    "ablation": "bench.ablation",
    "cpu": "bench.cpu",
    "generate": "bench.generate",
    "gpu-micro": "bench.gpu.micro",
    "gpu-step": "bench.gpu.step",
    "gpu-ladder": "bench.gpu.ladder",
    "report": "bench.report",
    "scaling": "bench.scaling",
}
"""Each with a `main` that takes the other arguments; --help shows them."""


def main(arguments: list[str]) -> int | None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(f"usage: python -m bench {{{','.join(COMMANDS)}}} ...")
        return 0
    if command not in COMMANDS:
        raise UserError(
            f"unknown command '{command}'", found=" ".join(arguments), expected=f"one of {', '.join(COMMANDS)}",
            remedy="python -m bench --help",
        )  # fmt: skip
    code: int | None = importlib.import_module(COMMANDS[command]).main(arguments[1:])
    return code


if __name__ == "__main__":
    run_guarded(lambda: main(sys.argv[1:]))
