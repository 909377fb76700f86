"""From command-line overrides to a checked RunConfig: the only place where conf/ is composed; imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import secrets
from collections.abc import Sequence
from datetime import datetime
from enum import Enum
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
from anchorformer.schema import TARGET, parse
from train.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
OWN_BACKBONE = {
    "vision": "a hub id or a folder of your own is model.vision=...",
    "llm": "a hub id or a folder of your own is model.language_model=...",
}
PLUGIN_GROUPS = ("selector", "connector")
"""Config groups whose YAML names a class of the model that has fields of its own."""
SEE = "`python -m train --help` lists the config groups and their options"


def compose(overrides: Sequence[str], conf: Path = CONF) -> RunConfig:
    """Composes conf/ with the overrides and parses the result.

    Args:
        overrides: as on the command line: `group=option`, `key.path=value`, `+group...` as Hydra writes them.

    Raises:
        UserError: unknown key (with the nearest valid one), unknown option of a group, a value of the wrong type, a
            value that is still missing, or values that contradict each other.
    """
    return parse(RunConfig, compose_plain(overrides, conf), "config")


def compose_plain(overrides: Sequence[str], conf: Path = CONF) -> dict[str, Any]:
    """The composed mapping before it is parsed, every interpolation resolved; raises what `compose` does but types."""
    groups = read_groups(conf)
    parsed = [_read_override(text) for text in overrides]
    known = [*groups, *schema_keys(), *_plugin_keys(conf)]
    checked = [_check_override(override, groups, known) for override in parsed]
    if "stage" not in {override.key_or_group for override in parsed}:
        raise UserError(
            "no stage is chosen", found=" ".join(overrides) or "no overrides",
            expected=f"one of stage={', stage='.join(groups['stage'])}", remedy="e.g. python -m train stage=align",
        )  # fmt: skip
    try:
        with initialize_config_dir(str(conf), version_base=None):
            _check_plugin_keys(parsed, checked)
            composed = hydra_compose("config", overrides=checked)
            missing = sorted(OmegaConf.missing_keys(composed))
            if missing:
                raise UserError(
                    f"{len(missing)} value(s) are missing", found=", ".join(f"{key}=???" for key in missing),
                    expected="a value for each of them", remedy="add " + " ".join(f"{key}=..." for key in missing),
                )  # fmt: skip
            plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            "the config cannot be composed", found=" / ".join(str(error).split("\n")[:2]).strip(),
            expected="groups and keys that exist, and values that Hydra can read", remedy=SEE,
        ) from None  # fmt: skip
    assert isinstance(plain, dict)
    if plain["run"] is None:
        plain["run"] = f"{plain['stage']['name']}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return {str(key): value for key, value in plain.items()}


def read_groups(conf: Path = CONF) -> dict[str, list[str]]:
    """Config group -> its options: the groups that config.yaml chooses from, the files that lie in their folders."""
    chosen = [next(iter(entry)) for entry in OmegaConf.load(conf / "config.yaml").defaults if entry != "_self_"]
    return {group: sorted(path.stem for path in (conf / group).glob("*.yaml")) for group in chosen if " " not in group}


def schema_keys(cls: type = RunConfig) -> list[str]:
    """Dotted path of every field that the config classes declare."""
    keys = []
    for name, hint in get_type_hints(cls).items():
        keys.append(name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            keys += [f"{name}.{inner}" for inner in schema_keys(hint)]
    return keys


def _read_override(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(
            "an override cannot be read", found=f"{text!r} ({str(error).splitlines()[0]})",
            expected="key=value; values with blanks, commas or brackets in quotes",
            remedy="quote it for the shell as well: 'key=\"a value\"'",
        ) from None  # fmt: skip


def _check_override(override: Override, groups: dict[str, list[str]], known: Sequence[str]) -> str:
    """The override as Hydra shall see it.

    Keys of the config classes are always settable, whether a YAML mentions them or not, so they are passed on with
    `++`; and a key that nobody knows is refused also with `+`, which Hydra would accept.
    """
    text, key = str(override.input_line), override.key_or_group.split("@")[0]
    if key in groups:
        _check_option(key, override, groups[key])
        return text.lstrip("+")
    if not _is_declared(key.split("."), RunConfig):
        near = _nearest(key, known)
        raise UserError(
            f"unknown key '{key}'", found=text,
            expected=f"'{near[0]}'?" if near else "one of " + ", ".join(dict.fromkeys([*groups, *_top_keys()])),
            remedy=SEE,
        )  # fmt: skip
    return "++" + text.lstrip("+") if not override.is_delete() and not _is_plugin(key) else text


def _check_plugin_keys(parsed: Sequence[Override], checked: Sequence[str]) -> None:
    # The fields of a plug-in are known to its own class, which would load torch; its YAML lists them all.
    mine = {str(override.input_line): override.key_or_group for override in parsed if _is_plugin(override.key_or_group)}
    if not mine:
        return
    composed = hydra_compose("config", overrides=[text for text in checked if text not in mine])
    for text, key in mine.items():
        parent, _, last = key.rpartition(".")
        siblings = OmegaConf.select(composed, parent)
        if text.startswith("+") or siblings is None or last in siblings:
            continue
        near = difflib.get_close_matches(last, [str(name) for name in siblings], n=1)
        raise UserError(
            f"unknown key '{key}'", found=text,
            expected=f"'{parent}.{near[0]}'?" if near else f"one of {', '.join(map(str, siblings))}",
            remedy="choose a key of this plug-in; another plug-in is another option of its group",
        )  # fmt: skip


def _top_keys() -> list[str]:
    return [field.name for field in dataclasses.fields(RunConfig)]


def _check_option(group: str, override: Override, options: list[str]) -> None:
    value = override.value()
    names = value if isinstance(value, list) else [value]
    for name in names:
        if name is not None and str(name) not in options:
            near = difflib.get_close_matches(str(name), options, n=1)
            raise UserError(
                f"'{name}' is not an option of the config group '{group}'", found=override.input_line,
                expected=(f"'{near[0]}'? Options: " if near else "one of ") + ", ".join(options),
                remedy=OWN_BACKBONE.get(group, SEE),
            )  # fmt: skip


def _is_declared(path: list[str], hint: Any) -> bool:
    """Whether a dotted path leads to a field of the config classes, or into one of their plug-in mappings."""
    if not path:
        return True
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        inner = get_type_hints(hint).get(path[0])
        return inner is not None and _is_declared(path[1:], inner)
    if get_origin(hint) is dict:
        key, value = get_args(hint)
        known = not issubclass(key, Enum) or path[0] in {member.value for member in key}
        return known and _is_declared(path[1:], value)
    return hint is Any


def _is_plugin(key: str) -> bool:
    # Sources are left to their own classes, which load no torch.
    return key.startswith(tuple(f"model.{group}." for group in PLUGIN_GROUPS))


def _plugin_keys(conf: Path) -> list[str]:
    """Dotted path of every field of the model's plug-ins, as their YAML files list them."""
    keys = [
        f"model.{group}.{key!s}"
        for group in PLUGIN_GROUPS
        for path in sorted((conf / group).glob("*.yaml"))
        for key in OmegaConf.load(path)
        if key not in ("defaults", TARGET)
    ]
    return list(dict.fromkeys(keys))


def _nearest(key: str, known: Sequence[str]) -> list[str]:
    """The key that was meant, if any: its end was typed, it is spelt much alike, or only its last part is."""
    ends = [name for name in known if name.endswith(f".{key}")]
    if ends:
        return ends[:1]
    by_last = {name.rsplit(".", 1)[-1]: name for name in known}
    last = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_last), n=1)
    return difflib.get_close_matches(key, known, n=1) or [by_last[name] for name in last]
