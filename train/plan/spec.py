"""Plug-in mappings as the plan reads them: by class path and field, without importing what would load torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from anchorformer.errors import UserError
from anchorformer.schema import TARGET

Row = TypeVar("Row")


def row_of(spec: Mapping[str, Any], what: str, rows: Mapping[str, Row]) -> Row:
    """The entry of a plug-in's class path.

    Args:
        what: `selector`, `connector` or `integration`, for the message.

    Raises:
        UserError: the plan does not know the plug-in.
    """
    target = str(spec.get(TARGET))
    if target not in rows:
        raise UserError(
            f"the plan does not know what this {what} costs", found=target, expected=f"one of {sorted(rows)}",
            remedy=f"add its row to train/plan/{'shapes' if what == 'selector' else f'{what}s'}.py, "
            "or run unplanned: hardware.card=null",
        )  # fmt: skip
    return rows[target]


def field_of(spec: Mapping[str, Any], what: str, name: str) -> Any:
    """
    Raises:
        UserError: the mapping leaves the field out.
    """
    if name not in spec:
        raise UserError(
            f"model.{what}.{name} is not written out", found=f"{spec}", expected="every field of the plug-in",
            remedy=f"choose it by its YAML, {what}=...",
        )  # fmt: skip
    return spec[name]
