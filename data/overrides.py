"""How the overrides of scan and evals are read: key=value in, a composed mapping out, each mistake in plain words."""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anchorformer.errors import UserError

CONF = Path(__file__).resolve().parent.parent / "conf"

HELP = ("-h", "--help")
"""What asks for the usage, wherever it stands in the command."""

_NAME = re.compile(r"[A-Za-z_][\w.]*")


def options(group: str) -> list[str]:
    """The YAML files of a config group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def read(overrides: Sequence[str], remedy: str) -> list[Override]:
    """Every override, parsed.

    Args:
        remedy: the next thing to do where one cannot be read.

    Raises:
        UserError: an option with dashes, a word without a value, several values that are not written as a list, or
            a value that needs quotes.
    """
    return [_read(text, overrides[place + 1 :], remedy) for place, text in enumerate(overrides)]


def check_keys(parsed: Iterable[Override], schema: type, groups: Sequence[str], remedy: str) -> None:
    """Every key must be a config group, or a field of `schema` or of a dataclass in it.

    Raises:
        UserError: naming the unknown key and the nearest valid one.
    """
    valid = [*groups, *schema_keys(schema)]
    by_last = {name.rpartition(".")[2]: name for name in reversed(valid)}
    for override in parsed:
        key = override.key_or_group
        if key in groups or _is_declared(key.split("."), schema):
            continue
        last = difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1)
        near = difflib.get_close_matches(key, valid, n=1) or [by_last[name] for name in last]
        top = dict.fromkeys(name.partition(".")[0] for name in valid)
        raise UserError(
            f"unknown key '{key}'",
            found=str(override.input_line),
            expected=f"'{near[0]}'?" if near else f"one of {', '.join(top)}",
            remedy=remedy,
        )


def check_option(key: str, name: str, valid: Sequence[str], remedy: str) -> None:
    """The value of a config group must be one of its files.

    Raises:
        UserError: naming the nearest ones, and all of them.
    """
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=2)
        guess = " or ".join(f"'{option}'" for option in near)
        raise UserError(
            f"there is no {key} '{name}'",
            found=f"{key}={name}",
            expected=f"{guess}? There are: {', '.join(valid)}" if near else f"one of {', '.join(valid)}",
            remedy=remedy,
        )


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


def compose(config: str, parsed: Iterable[Override], groups: Sequence[str], more: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping that conf/<config>.yaml and the overrides come to, every interpolation resolved.

    Args:
        groups: keys that choose a file; all other ones are values, settable whether a YAML mentions them or not.
        more: further overrides, as Hydra shall see them; they come first.

    Raises:
        UserError: it cannot be composed, or a value is missing.
    """
    texts = [_forced(override, groups) for override in parsed]
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            composed = hydra_compose(config, overrides=[*more, *texts])
        missing = sorted(OmegaConf.missing_keys(composed))
        plain = {} if missing else OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            "the config cannot be composed",
            found=" / ".join(str(error).splitlines()[:2]),
            expected="keys and values that fit each other",
            remedy="correct the override that is named",
        ) from None
    if missing:
        raise UserError(
            f"{len(missing)} value(s) are missing",
            found=", ".join(f"{key}=???" for key in missing),
            expected="a value for each of them",
            remedy="add " + " ".join(f"{key}=..." for key in missing),
        )
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def schema_keys(schema: type) -> list[str]:
    """Dotted path of every field that a config dataclass declares, inner ones included."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        if not name.startswith("__"):
            keys += [name, *(f"{name}.{inner}" for inner in (schema_keys(hint) if _is_schema(hint) else ()))]
    return keys


def defaults(schema: type, parent: str = "") -> Iterator[str]:
    """`key=value` of every field that has a default, for the usage; lists and nulls as the command line has them."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if _is_schema(hints[field.name]):
            yield from defaults(hints[field.name], f"{parent}{field.name}.")
        elif field.default is not dataclasses.MISSING:
            yield f"{parent}{field.name}={_written(field.default)}"


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(_written, value))}]"
    return "null" if value is None else str(getattr(value, "value", value))


def _read(text: str, following: Sequence[str], remedy: str) -> Override:
    bare = text.lstrip("-")
    if bare != text:
        value = "" if "=" in bare else f"={following[0]}" if following and "=" not in following[0] else "=..."
        raise UserError(
            "an override cannot be read", found=text, expected=f"{bare}{value}, without dashes", remedy=remedy
        )
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        word = _NAME.fullmatch(text)
        raise UserError(
            "an override cannot be read",
            found=text,
            expected=f"{text}=..." if word else "key=value; a value with commas, brackets, quotes or '=' in quotes",
            remedy=remedy if word else "quote the value once more for the shell: 'key=\"the value\"'",
        ) from None
    if override.is_sweep_override():
        key, _, values = text.partition("=")
        raise UserError(
            f"'{key}' has several values",
            found=text,
            expected=f'one value, or a list where one is taken: "{key}=[{values}]"',
            remedy="write the list in brackets, and quote it for the shell",
        )
    return override


def _forced(override: Override, groups: Sequence[str]) -> str:
    text = str(override.input_line)
    if override.is_delete() or override.key_or_group in groups:
        return text
    return "++" + text.lstrip("+")


def _is_schema(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _is_declared(path: Sequence[str], hint: Any) -> bool:
    """Whether a dotted path leads to a field, or into one of the plug-in mappings, which their own classes check."""
    if not path:
        return True
    if _is_schema(hint):
        inner = get_type_hints(hint).get(path[0])
        return inner is not None and _is_declared(path[1:], inner)
    return hint is Any or (get_origin(hint) in (dict, Mapping) and _is_declared(path[1:], get_args(hint)[1]))
