"""Published annotation files, as JSON: entries one by one, and the few checks that all their parsers need."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from anchorformer.errors import UserError
from data.record import Record

Parser = Callable[[dict[str, Any], int], Record]


class RecordError(ValueError):
    """What is wrong with one record, from its parser; file and position are added by the reader."""


def read_entries(path: Path) -> Iterator[Any]:
    """The entries of a JSON list, or of the list under `data`, one by one without holding them all.

    Raises:
        UserError: not UTF-8, not complete JSON (with the byte where it breaks off), or no list of records.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text",
            found=f"byte {content[error.start]:#04x} at byte {error.start}",
            expected="a JSON file in UTF-8",
            remedy="fetch the file again",
        ) from None
    size = len(content)
    del content
    decoder = json.JSONDecoder()

    def failed(problem: str, position: int) -> UserError:
        return UserError(
            f"{path}: the JSON breaks off or is damaged",
            found=f"{problem} at byte {len(text[:position].encode())} of {size}",
            expected="complete JSON",
            remedy="fetch the file again and compare its size or checksum with the published one",
        )

    def skip(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    def value(position: int) -> tuple[Any, int]:
        try:
            return decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise failed(error.msg, error.pos) from None
        except (RecursionError, ValueError) as error:  # nested without end; a number of thousands of digits
            raise failed(str(error), position) from None

    position = skip(0)
    if text[position : position + 1] != "[":
        whole, end = value(position)
        if skip(end) != len(text):
            raise failed("text after the end", end)
        if not isinstance(whole, dict) or not isinstance(whole.get("data"), list):
            raise UserError(
                f"{path}: not a list of records",
                found=f"keys {sorted(whole)[:8]}" if isinstance(whole, dict) else type(whole).__name__,
                expected="a list, or an object with the list under 'data'",
                remedy="check which file the source names",
            )
        yield from whole["data"]
        return
    position = skip(position + 1)
    while text[position : position + 1] != "]":
        entry, position = value(position)
        yield entry
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            raise failed("no ',' or ']' after a record", position)
    if skip(position + 1) != len(text):
        raise failed("text after the end", position + 1)


@dataclass(frozen=True, slots=True)
class AnnotationFile:
    """A published file, and how one entry of it (with its position) becomes a record.

    Attributes:
        entries: reads the file; a list of JSON objects unless said otherwise (`data.readers` has other layouts).
        beside: further files that `entries` reads; what is in them decides the records too.
    """

    path: Path
    parse: Parser
    entries: Callable[[Path], Iterator[Any]] = read_entries
    beside: tuple[Path, ...] = ()


def image_path(value: object) -> str:
    """An image path of an annotation, refused where it could leave its root whatever the root is.

    Raises:
        RecordError: not a string, empty, absolute, or with a `..` in it.
    """
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise RecordError(f"image path is {value!r}, not a file name")
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts:
        raise RecordError(f"image path {value!r} leaves the image root")
    return str(path)


def id_of(raw: Mapping[str, Any], key: str, position: int) -> str:
    """The id under `key` as text; `#` and the position where there is none.

    Raises:
        RecordError: neither text nor a number.
    """
    value = raw.get(key)
    if value is None:
        return f"#{position}"
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RecordError(f"'{key}' is {str(value)[:80]!r}, neither text nor a number")
    return str(value)


def check_text(record: Record) -> None:
    """Refuses text that cannot be written down in any encoding, and so is in no tokenizer either.

    Raises:
        RecordError: half of a surrogate pair, as JSON's `\\ud83d` without its other half gives.
    """
    pairs = [text for pair in record.meta for text in pair]
    paths = [str(image.path) for image in record.images]
    for text in (record.id, *paths, *(turn.text for turn in record.turns), *record.references, *pairs):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = text[max(0, error.start - 20) : error.end]
            raise RecordError(f"half of a surrogate pair, {text[error.start]!r}, behind {around[:-1]!r}") from None


def text_of(raw: Mapping[str, Any], key: str) -> str:
    """The string under `key`.

    Raises:
        RecordError: absent or no string.
    """
    value = raw.get(key)
    if not isinstance(value, str):
        raise RecordError(f"'{key}' is missing" if value is None else f"'{key}' is {value!r}, not a string")
    return value


def strings_of(raw: Mapping[str, Any], key: str) -> list[str]:
    """The list of strings under `key`; an empty one where there is none.

    Raises:
        RecordError: something else.
    """
    value = raw.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RecordError(f"'{key}' is {str(value)[:80]!r}, not a list of strings")
    return value


def votes_of(raw: Mapping[str, Any], key: str = "answers") -> list[str]:
    """What people answered, of a list of objects with `answer`; an empty one where there is none.

    Raises:
        RecordError: something else.
    """
    value = raw.get(key, [])
    if not isinstance(value, list) or not all(
        isinstance(item, dict) and isinstance(item.get("answer"), str) for item in value
    ):
        raise RecordError(f"'{key}' is {str(value)[:80]!r}, not a list of objects with 'answer'")
    return [item["answer"] for item in value]
