"""A conversation about an image in the terminal: `python -m anchorformer.chat MODEL IMAGE`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import yaml
from PIL import Image

from anchorformer import decoding as decodings
from anchorformer.answering import Answer
from anchorformer.decoding.base import Decoding, DecodingConfig
from anchorformer.dialogue import PLACEHOLDER
from anchorformer.errors import UserError, run_guarded
from anchorformer.images import open_image
from anchorformer.opening import Opened, open_model
from anchorformer.schema import parse, plugins_by_name
from anchorformer.seen import Seen

HELP = "/image PATH begins anew with another image, /quit leaves"


def chat(
    opened: Opened, image: Image.Image, lines: Iterable[str], *, max_new_tokens: int, decoding: Decoding | None = None
) -> Iterator[str]:  # fmt: skip
    """Text for the terminal, answers piece by piece; each question is asked with the turns before it.

    A mistake in a line is told, and the conversation goes on.

    Args:
        lines: what the user types, a question or command each.
        decoding: of this model; None is greedy.
    """
    seen, turns = Seen(opened.model, opened.processor, [image], decoding), list[tuple[str, str]]()
    for line in map(str.strip, lines):
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/image":
                image = open_image(Path(argument.strip()).expanduser())
                seen, turns = Seen(opened.model, opened.processor, [image], decoding), []
                yield f"{argument.strip()}: {image.width} x {image.height} pixels\n"
            elif command.startswith("/"):
                yield f"{command} is no command; {HELP}\n"
            elif line:
                asked = (*turns, ("user", line if turns else f"{PLACEHOLDER}\n{line}"))
                answer = Answer(opened.model, opened.processor, asked, seen, max_new_tokens=max_new_tokens)
                yield from answer
                yield "\n"
                turns = [*asked, ("assistant", answer.text.strip())]
        except UserError as error:
            yield f"error: {error}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m anchorformer.chat", description=__doc__, epilog=HELP)
    parser.add_argument("model", type=Path, help="model folder, or a finished run")
    parser.add_argument("image", type=Path, help="what the questions are about")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of one answer (default: 256)")
    parser.add_argument(
        "--decoding", nargs="+", default=["greedy"], metavar=("NAME", "KEY=VALUE"),
        help="greedy (default), or damro with any of alpha, top_k, beta and layer; a file of anchorformer/decoding",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    image, config = open_image(options.image), read_decoding(*options.decoding)
    opened = open_model(options.model)
    decoding = config.build(opened.model)
    if sys.stdin.isatty():
        print(HELP)
    for text in chat(opened, image, _typed(), max_new_tokens=options.max_new_tokens, decoding=decoding):
        print(text, end="", flush=True)


def read_decoding(name: str, *values: str) -> DecodingConfig:
    """The decoding of that name, with `KEY=VALUE` for what is to be otherwise than its defaults.

    Raises:
        UserError: no such decoding, or values that do not fit it.
    """
    kinds = plugins_by_name(DecodingConfig, decodings.__name__)
    remedy = "e.g. --decoding damro alpha=1 top_k=10"
    if name not in kinds or not all("=" in value for value in values):
        raise UserError(
            "--decoding cannot be read", found=" ".join((name, *values)),
            expected=f"one of {', '.join(sorted(kinds))}, and KEY=VALUE", remedy=remedy,
        )  # fmt: skip
    pairs = (value.split("=", 1) for value in values)
    return parse(kinds[name], {key: yaml.safe_load(value) for key, value in pairs}, f"--decoding {name}", remedy)


def _typed() -> Iterator[str]:
    """Lines of the terminal, or of a pipe, until they end."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


if __name__ == "__main__":
    run_guarded(main)
