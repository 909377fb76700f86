"""Files as runs leave them: JSON, JSON lines that a kill may have cut short, YAML; and writing one in a single move."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from anchorformer.errors import UserError


def read_json(path: Path, needs: Collection[str] = ()) -> dict[str, Any]:
    """One JSON object.

    Args:
        needs: keys that it has to have.

    Raises:
        UserError: the file is not there, or holds something else.
    """
    try:
        return _checked(json.loads(path.read_text("utf-8")), needs)
    except (OSError, ValueError) as error:
        raise unreadable(path, str(error)) from None


def read_lines(
    path: Path, needs: Collection[str] = (), without: Collection[str] = ()
) -> tuple[list[dict[str, Any]], bool]:
    """The objects of a JSON lines file, and whether its last line was left out because it is not complete.

    A kill can cut the last line short, and a run that still goes may be writing it.

    Args:
        needs: keys that each object has to have.
        without: keys that are dropped at once, so that long runs fit into memory.

    Raises:
        UserError: a line before the last is damaged.
    """
    text = path.read_text("utf-8", errors="replace")
    end = text.rfind("\n") + 1
    rows = []
    # Not `splitlines`: answers may hold other ends of lines (U+2028), which JSON does not escape.
    for number, line in enumerate(text[:end].split("\n")[:-1], start=1):
        try:
            content = _checked(json.loads(line), needs)
        except ValueError as error:
            raise unreadable(path, f"line {number}: {error}") from None
        rows.append({key: value for key, value in content.items() if key not in without})
    return rows, bool(text[end:].strip())


def read_flat(path: Path) -> dict[str, Any]:
    """A YAML or JSON mapping as dotted keys; a list is one value. An absent file is an empty mapping.

    Raises:
        UserError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text("utf-8")) if path.suffix == ".yaml" else read_json(path)
    except yaml.YAMLError as error:
        raise unreadable(path, str(error)) from None
    if not isinstance(content, dict):
        raise unreadable(path, "no mapping")
    return flat(content)


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys, in their order."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def replace(path: Path, text: str) -> None:
    """Writes beside the place and moves into it: the file is complete or absent."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, "utf-8", newline="")
    beside.replace(path)


def _checked(content: Any, needs: Collection[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    if missing := [key for key in needs if key not in content]:
        raise ValueError(f"no {', '.join(missing)} in it")
    return content


def unreadable(path: Path, problem: str) -> UserError:
    return UserError(
        f"{path} cannot be read",
        found=problem,
        expected="the file as the run wrote it",
        remedy="run the step that writes it again",
    )
