"""How the command lines of train, scan and evals are read: overrides in, a composed mapping out; imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anchorformer.errors import UserError
from anchorformer.schema import TARGET

CONF = Path(__file__).resolve().parent.parent / "conf"

_NAME = re.compile(r"[A-Za-z_][\w.]*")


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """What the overrides of one command may be: config groups, and the keys that its config classes declare.

    Attributes:
        command: as it is typed; `--help` behind it lists what there is.
        config: conf/<config>.yaml, whose defaults list names the groups.
        schema: dataclass that the mapping is going to be parsed into.
        keys: further keys, which the command replaces before it parses the mapping.
        plugins: mappings whose fields only a class that needs torch can know; the YAMLs of the group that fills one
            (conf/selector for `model.selector`) list them all.
        remedies: group -> what may be typed where none of its files is right.
    """

    command: str
    config: str
    schema: type
    keys: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    remedies: Mapping[str, str] = field(default_factory=dict)

    @property
    def remedy(self) -> str:
        return f"correct the override; `{self.command} --help` lists what there is"

    @property
    def groups(self) -> dict[str, list[str]]:
        """Config group -> its options: the groups that the config chooses from, the files that lie in their folders."""
        return {group: options(group) for group in self._chosen}

    def read(self, overrides: Sequence[str]) -> list[Override]:
        """Every override, parsed; its key is a known one, and an option is a file of its group.

        Raises:
            UserError: an option with dashes, a word without a value, several values that are not written as a list,
                a value that needs quotes; an unknown key or option, with the nearest valid one; a group of which one
                option must be chosen and none is.
        """
        parsed = [_read(text, overrides[place + 1 :], self.remedy) for place, text in enumerate(overrides)]
        groups = self.groups
        known = [*groups, *self.keys, *schema_keys(self.schema), *self._plugin_keys()]
        for override in parsed:
            key = override.key_or_group
            if key in groups:
                if override.value() is None and not override.is_delete():
                    raise UserError(
                        f"{key}=null names no file",
                        found=f"{key}=null",
                        expected=f"one of {', '.join(groups[key])}",
                        remedy=f"leave {key} out, or name one of them",
                    )
                for name in values(override):
                    check_option(key, name, groups[key], self.remedies.get(key, f"name a file of conf/{key}"))
            elif key not in self.keys and not _is_declared(key.split("."), self.schema):
                raise _unknown_key(override, known, [name.partition(".")[0] for name in known], self.remedy)
        given = {override.key_or_group for override in parsed}
        for group in groups:
            if self._chosen[group] == "???" and group not in given:
                raise UserError(
                    f"no {group} is chosen",
                    found=" ".join(overrides) or "no overrides",
                    expected=f"{group}= with one of {', '.join(groups[group])}",
                    remedy=f"add {group}=...; `{self.command} --help` shows the whole command",
                )
        return parsed

    def compose(
        self, parsed: Sequence[Override], more: Sequence[str] = (), stand_ins: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The mapping that the config and the overrides come to, every interpolation resolved.

        Args:
            more: further overrides, as Hydra shall see them; they come first.
            stand_ins: key -> its value where neither YAML nor override gives one.

        Raises:
            UserError: an unknown key of a plug-in, overrides that cannot be composed, or a value that is missing.
        """
        groups = self.groups
        try:
            with initialize_config_dir(str(CONF), version_base=None):
                self._check_plugin_keys(parsed, more)
                texts = [_forced(override, groups) for override in parsed]
                composed = hydra_compose(self.config, overrides=[*more, *texts])
            for key, value in (stand_ins or {}).items():
                if key in OmegaConf.missing_keys(composed):
                    OmegaConf.update(composed, key, value)
            missing = sorted(OmegaConf.missing_keys(composed))
            plain = {} if missing else OmegaConf.to_container(composed, resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(
                "the config cannot be composed",
                found=" / ".join(str(error).splitlines()[:2]).strip(),
                expected="keys and values that fit each other",
                remedy=self.remedy,
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

    @property
    def _chosen(self) -> dict[str, Any]:
        """Config group -> the option that the config chooses, `???` where it leaves that to the command line."""
        config = OmegaConf.to_container(OmegaConf.load(CONF / f"{self.config}.yaml"))
        assert isinstance(config, dict)
        pairs = [pair for entry in config["defaults"] if isinstance(entry, dict) for pair in entry.items()]
        return {group: option for group, option in pairs if " " not in group}  # not `optional ...` and the like

    def _plugin_keys(self) -> list[str]:
        """Dotted path of every field of the plug-ins, as the files of their groups list them."""
        keys = [
            f"{plugin}.{key!s}"
            for plugin in self.plugins
            for path in sorted((CONF / plugin.rpartition(".")[2]).glob("*.yaml"))
            for key in OmegaConf.load(path)
            if key not in ("defaults", TARGET)
        ]
        return list(dict.fromkeys(keys))

    def _check_plugin_keys(self, parsed: Sequence[Override], more: Sequence[str]) -> None:
        """A field must be one that the YAML of the chosen plug-in lists; `+` adds one, which its class checks later."""
        mine = [item for item in parsed if item.key_or_group.startswith(tuple(f"{name}." for name in self.plugins))]
        if not mine:
            return
        groups = self.groups
        texts = [_forced(override, groups) for override in parsed if override not in mine]
        composed = hydra_compose(self.config, overrides=[*more, *texts])
        for override in mine:
            parent, _, last = override.key_or_group.rpartition(".")
            siblings = OmegaConf.select(composed, parent)
            added = override.is_add() or override.is_force_add()
            if added or not isinstance(siblings, DictConfig) or last in siblings:
                continue
            names = [str(name) for name in siblings]
            remedy = "choose a key of this plug-in; another plug-in is another option of its group"
            raise _unknown_key(override, [f"{parent}.{name}" for name in names], names, remedy)


def options(group: str) -> list[str]:
    """The YAML files of a config group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def values(override: Override) -> list[str]:
    """What an override sets: one value, the items of a list, or nothing for null."""
    value = override.value()
    return [str(item) for item in (value if isinstance(value, list) else [value]) if item is not None]


def alternatives(text: str) -> tuple[str, list[Any]] | None:
    """The key of an override and what it may be: several values of `key=one,other`, as Hydra writes a choice, else one.

    None for a word that is no override, or leaves its values to Hydra; whoever reads it as one says what is wrong.
    """
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(text)
    except HydraException:
        return None
    key = override.key_or_group
    if override.is_choice_sweep():
        return key, [parser.parse_override(f"{key}={value}").value() for value in override.sweep_string_iterator()]
    return None if override.is_sweep_override() or override.is_delete() else (key, [override.value()])


def check_option(group: str, name: str, valid: Sequence[str], remedy: str) -> None:
    """An option must be one of the group's files.

    Raises:
        UserError: naming the nearest ones, and all of them.
    """
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=2)
        guess = " or ".join(f"'{option}'" for option in near)
        raise UserError(
            f"there is no {group} '{name}'",
            found=f"{group}={name}",
            expected=f"{guess}? There are: {', '.join(valid)}" if near else f"one of {', '.join(valid)}",
            remedy=remedy,
        )


def schema_keys(schema: type) -> list[str]:
    """Dotted path of every field that a config dataclass declares, inner ones included."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        keys += [name, *(f"{name}.{inner}" for inner in (schema_keys(hint) if _is_schema(hint) else ()))]
    return keys


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
        key, _, found = text.partition("=")
        raise UserError(
            f"'{key}' has several values",
            found=text,
            expected=f'one value, or a list where one is taken: "{key}=[{found}]"',
            remedy="write the list in brackets, and quote it for the shell",
        )
    return override


def _forced(override: Override, groups: Iterable[str]) -> str:
    """The override as Hydra shall see it: keys of the config classes can be set whether a YAML mentions them or not."""
    text = str(override.input_line)
    if override.is_delete():
        return text
    return text.lstrip("+") if override.key_or_group in groups else "++" + text.lstrip("+")


def _unknown_key(override: Override, known: Sequence[str], choices: Sequence[str], remedy: str) -> UserError:
    # Hydra would accept an unknown key with `+`; here it is as unknown as without.
    near = _nearest(override.key_or_group, known)
    return UserError(
        f"unknown key '{override.key_or_group}'",
        found=str(override.input_line),
        expected=f"'{near}'?" if near else f"one of {', '.join(dict.fromkeys(choices))}",
        remedy=remedy,
    )


def _nearest(key: str, known: Sequence[str]) -> str | None:
    """The key that was meant, if any: its end was typed, it is spelt much alike, or only its last part is."""
    ends = [name for name in known if name.endswith(f".{key}")]
    by_last = {name.rpartition(".")[2]: name for name in reversed(known)}
    last = difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1)
    return next(iter([*ends, *difflib.get_close_matches(key, known, n=1), *(by_last[name] for name in last)]), None)


def _is_schema(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _is_declared(path: Sequence[str], hint: Any) -> bool:
    """Whether a dotted path leads to a field, or into one of the plug-in mappings."""
    if not path:
        return True
    if _is_schema(hint):
        inner = get_type_hints(hint).get(path[0])
        return inner is not None and _is_declared(path[1:], inner)
    if get_origin(hint) is dict:
        key, value = get_args(hint)
        known = not issubclass(key, Enum) or path[0] in {member.value for member in key}
        return known and _is_declared(path[1:], value)
    if get_origin(hint) is UnionType:
        return any(_is_declared(path, option) for option in get_args(hint))
    return hint is Any
