"""Published files that are no JSON list, read as entries: JSON lines, JSON mappings, tables with tabs."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError


def read_json(path: Path) -> Any:
    """A whole JSON file.

    Raises:
        UserError: missing, not UTF-8, or no complete JSON.
    """
    return _parse(_text(path), path)


def json_list(path: Path, key: str) -> list[Any]:
    """The list under `key` of a JSON object.

    Raises:
        UserError: what `read_json` raises, or there is no such list.
    """
    whole = read_json(path)
    found = whole.get(key) if isinstance(whole, dict) else None
    if not isinstance(found, list):
        raise _other_layout(path, whole, f"an object with a list under '{key}'")
    return found


def json_mapping(path: Path) -> Iterator[Any]:
    """The objects of a mapping from ids to objects, each with its id under `id`.

    Raises:
        UserError: what `read_json` raises, or another layout.
    """
    whole = read_json(path)
    if not isinstance(whole, dict):
        raise _other_layout(path, whole, "an object of records by id")
    for name, value in whole.items():
        yield {**value, "id": name} if isinstance(value, dict) else value


def json_lines(path: Path) -> Iterator[Any]:
    """One JSON value per line; empty lines are passed over.

    Raises:
        UserError: not UTF-8, or a line that is no JSON.
    """
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield _parse(line, path, f" in line {number}")


def table(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a table whose columns are divided by tabs and named in its first line; empty cells are left out.

    Raises:
        UserError: not UTF-8, no rows, or a row with other columns.
    """
    csv.field_size_limit(sys.maxsize)  # a cell may hold an image
    rows = csv.DictReader(_text(path).splitlines(keepends=True), delimiter="\t", strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise csv.Error("another number of cells than columns")
            yield {name: cell for name, cell in row.items() if cell != ""}
    except csv.Error as error:
        raise UserError(
            f"{path}: the table is damaged", found=f"{error} in line {rows.line_num}",
            expected="rows of the columns that its first line names, divided by tabs", remedy="fetch the file again",
        ) from None  # fmt: skip


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text", found=f"byte {error.object[error.start]:#04x} at byte {error.start}",
            expected="a text file in UTF-8", remedy="fetch the file again",
        ) from None  # fmt: skip
    except FileNotFoundError:
        raise UserError(
            "a file is missing", found=f"nothing at {path}", expected="the published file",
            remedy="check data.root and the source's paths, or fetch the file",
        ) from None  # fmt: skip


def _parse(text: str, path: Path, where: str = "") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: the JSON breaks off or is damaged", found=f"{error}{where}", expected="complete JSON",
            remedy="fetch the file again and compare its size or checksum with the published one",
        ) from None  # fmt: skip


def _other_layout(path: Path, whole: Any, expected: str) -> UserError:
    return UserError(
        f"{path}: not in the published layout",
        found=f"keys {sorted(whole)[:8]}" if isinstance(whole, dict) else f"a JSON {type(whole).__name__}",
        expected=expected,
        remedy="check which file the source names",
    )
