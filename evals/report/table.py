"""A table of the report: values as they are, and how each column is written for Markdown, CSV and a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Value = str | int | float | None


@dataclass(frozen=True)
class Column:
    """A heading, and the format of its numbers; text where there is none."""

    name: str
    format: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under columns; None is an empty cell.

    Attributes:
        name: of its CSV file and its place on the page.
        note: what a reader has to know of it, as sentences.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    note: str = ""


def written(value: Any, column: Column) -> str:
    """A cell as text for readers."""
    if value is None:
        return ""
    return format(value, column.format) if column.format and isinstance(value, int | float) else str(value)


def markdown(table: Table) -> str:
    """Aligned, so that it reads on a terminal as well."""
    cells = [
        [written(value, column).replace("|", "\\|").replace("\n", " ")
         for value, column in zip(row, table.columns, strict=True)]
        for row in table.rows
    ]  # fmt: skip
    header = [column.name for column in table.columns]
    numeric = [bool(column.format) for column in table.columns]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    rule = [("-" * (width - 1) + ":") if right else "-" * width for width, right in zip(widths, numeric, strict=True)]

    def line(row: Sequence[str]) -> str:
        parts = zip(row, widths, numeric, strict=True)
        return f"| {' | '.join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in parts)} |"

    return "\n".join([line(header), line(rule), *map(line, cells)]) + "\n"


def comma_separated(table: Table) -> str:
    """All digits, for programs: RFC 4180 but for the line ends."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([column.name for column in table.columns])
    writer.writerows(table.rows)
    return file.getvalue()
