"""How a command explains itself: the keys, defaults and options of its usage, laid out for a terminal."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, get_type_hints

HELP = ("-h", "--help")
"""What asks for the usage, wherever it stands in the command."""


def listed(title: str, words: Iterable[str], separator: str = "") -> str:
    """A paragraph of the usage: its title, then the words in lines of a terminal's width, none of them broken."""
    text = f"{separator} ".join(words)
    return textwrap.fill(
        text,
        110,
        initial_indent=f"{title:9}",
        subsequent_indent=" " * 9,
        break_long_words=False,
        break_on_hyphens=False,
    )


def defaults(schema: type, parent: str = "") -> Iterator[str]:
    """`key=value` of every field that has a default, for the usage; lists and nulls as the command line has them."""
    hints = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from defaults(hints[item.name], f"{parent}{item.name}.")
        elif item.default is not dataclasses.MISSING:
            yield f"{parent}{item.name}={_written(item.default)}"


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(_written, value))}]"
    return "null" if value is None else str(getattr(value, "value", value))
