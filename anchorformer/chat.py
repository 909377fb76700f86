"""A conversation about an image in the terminal: `python -m anchorformer.chat MODEL IMAGE`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from anchorformer.answering import Answer
from anchorformer.dialogue import PLACEHOLDER
from anchorformer.errors import UserError, run_guarded
from anchorformer.images import open_image
from anchorformer.opening import Opened, open_model
from anchorformer.seen import Seen

HELP = "/image PATH begins anew with another image, /quit leaves"


def chat(opened: Opened, image: Image.Image, lines: Iterable[str], *, max_new_tokens: int) -> Iterator[str]:
    """Text for the terminal, answers piece by piece; each question is asked with the turns before it.

    A mistake in a line is told, and the conversation goes on.

    Args:
        lines: what the user types, a question or command each.
    """
    seen, turns = Seen(opened.model, opened.processor, [image]), list[tuple[str, str]]()
    for line in map(str.strip, lines):
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/image":
                image = open_image(Path(argument.strip()).expanduser())
                seen, turns = Seen(opened.model, opened.processor, [image]), []
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
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    image = open_image(options.image)
    opened = open_model(options.model)
    if sys.stdin.isatty():
        print(HELP)
    for text in chat(opened, image, _typed(), max_new_tokens=options.max_new_tokens):
        print(text, end="", flush=True)


def _typed() -> Iterator[str]:
    """Lines of the terminal, or of a pipe, until they end."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


if __name__ == "__main__":
    run_guarded(main)
