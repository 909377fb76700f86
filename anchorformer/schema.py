"""Plain mappings in, frozen dataclasses out: the one border where configs are checked.

A mapping may hold *plug-ins*: `{"_target_": "anchorformer.connectors.mlp.MlpConfig", ...}` names a dataclass by its
full import path, so that a new connector, selector or data source is one file and one YAML.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import pydantic

from anchorformer.errors import UserError

T = TypeVar("T")


class Schema:
    """Base of every config dataclass: unknown keys are refused instead of ignored."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")


TARGET = "_target_"


REMEDY = "correct the key or value; `python -m train --cfg job` prints the composed config"


def parse(cls: type[T], values: Mapping[str, Any], where: str, remedy: str = REMEDY) -> T:
    """Builds the frozen dataclass `cls` from a plain mapping; unknown keys and wrong types are errors.

    Args:
        where: what the mapping is called by the user (a file or a config group), for the message.
        remedy: the next thing to do, for the message; each command has its own.

    Raises:
        UserError: naming every offending key, and for an unknown one the nearest valid key.
    """
    if not isinstance(values, Mapping):
        raise UserError(
            f"{where}: no {cls.__name__}", found=f"{type(values).__name__}: {str(values)[:60]}",
            expected=f"keys and values: {', '.join(field.name for field in dataclasses.fields(cls))}",
            remedy=remedy,
        )  # fmt: skip
    try:
        return pydantic.TypeAdapter(cls).validate_python(dict(values))
    except pydantic.ValidationError as error:
        problems = [_describe(cls, problem) for problem in error.errors(include_url=False)]
        found, expected = zip(*problems, strict=True)
        raise UserError(
            f"{where}: {len(problems)} value(s) do not fit {cls.__name__}",
            found="; ".join(found),
            expected="; ".join(expected),
            remedy=remedy,
        ) from None


def parse_plugin(base: type[T], spec: Mapping[str, Any], package: str, where: str, remedy: str = REMEDY) -> T:
    """Builds the plug-in named by `spec["_target_"]`, which must be a subclass of `base` inside `package`.

    Args:
        where, remedy: as in `parse`.

    Raises:
        UserError: target missing, outside the package (a config must not import arbitrary code), not found, or not a
            subclass of `base`; and what `parse` raises.
    """
    target = str(spec.get(TARGET, ""))
    module_name, _, class_name = target.rpartition(".")
    if not module_name.startswith(package + "."):
        raise UserError(
            f"{where}: {TARGET} does not name a {base.__name__}",
            found=target or "no _target_",
            expected=f"{package}.<file>.<class>",
            remedy=f"use one of the YAML files of this config group, or add a file to {package.replace('.', '/')}/",
        )
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(
            f"{where}: {TARGET} cannot be found",
            found=f"{target} ({error})",
            expected=f"a class in {package}",
            remedy="check the spelling of the file and the class",
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UserError(
            f"{where}: {TARGET} is of the wrong kind",
            found=target,
            expected=f"a subclass of {base.__name__}",
            remedy="choose a YAML of the right config group",
        )
    return parse(cls, {key: value for key, value in spec.items() if key != TARGET}, where, remedy)


def plugins_by_name(base: type[T], package: str) -> dict[str, type[T]]:
    """The plug-ins of a package by the names of their files, which are those of their YAMLs."""
    found: dict[str, type[T]] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        kinds = [value for value in own if isinstance(value, type) and issubclass(value, base)]
        if kinds and info.name != "base":
            found[info.name] = kinds[-1]
    return found


def to_plain(value: Any) -> Any:
    """The inverse of `parse`: dataclasses to mappings, enums to values, paths to strings, tuples to lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(to_plain(key)): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def plugin_to_plain(value: Any) -> dict[str, Any]:
    """A plug-in dataclass as the mapping `parse_plugin` reads."""
    return {TARGET: f"{type(value).__module__}.{type(value).__qualname__}", **to_plain(value)}


def _describe(cls: type, problem: Any) -> tuple[str, str]:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path)
    if problem["type"] == "unexpected_keyword_argument":
        beside = [field.name for field in dataclasses.fields(_owner(cls, path))]
        near = [close for names in (beside, _keys(cls)) for close in difflib.get_close_matches(path[-1], [*names], n=1)]
        return f"unknown key '{name}'", f"'{near[0]}'?" if near else f"one of {sorted(beside)}"
    if problem["type"] in ("missing_argument", "missing"):
        return f"'{name}' is missing", f"a value for '{name}'"
    return f"{name}={problem['input']!r}", problem["msg"]


def _keys(cls: type) -> Iterator[str]:
    for field in dataclasses.fields(cls):
        yield field.name
        hint = _field_type(cls, field.name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _keys(hint)


def _owner(cls: type, path: list[str]) -> type:
    """The dataclass that a path's last part was meant to be a field of; mappings may lie on the way."""
    owner, hint = cls, cls
    for part in path[:-1]:
        hint = get_args(hint)[1] if get_origin(hint) is dict else _field_type(hint, part)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            owner = hint
        elif get_origin(hint) is not dict:
            break
    return owner


def _field_type(cls: type, name: str) -> Any:
    return get_type_hints(cls).get(name)
