"""The config border: types, unknown keys with the nearest valid one, plug-ins inside their package only."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

import pytest

from anchorformer.errors import UserError, run_guarded
from anchorformer.schema import Schema, parse, parse_plugin, plugin_to_plain, to_plain
from anchorformer.selectors.anchor import AnchorSelectorConfig
from anchorformer.selectors.base import SelectorConfig


@dataclass(frozen=True, kw_only=True)
class Inner(Schema):
    depth: int = 2


@dataclass(frozen=True, kw_only=True)
class Outer(Schema):
    name: str
    inner: Inner = field(default_factory=Inner)
    rate: float | None = None


def test_round_trip() -> None:
    value = parse(Outer, {"name": "x", "inner": {"depth": 3}, "rate": 1}, "test")
    assert value == Outer(name="x", inner=Inner(depth=3), rate=1.0)
    assert parse(Outer, to_plain(value), "test") == value


@pytest.mark.parametrize(
    ("mapping", "fragments"),
    [
        ({"nam": "x"}, ["unknown key 'nam'", "'name'?"]),
        ({"name": "x", "inner": {"dephth": 1}}, ["inner.dephth", "'depth'?"]),
        ({"name": "x", "inner": {"depth": "abc"}}, ["inner.depth='abc'", "integer"]),
        ({"name": "x", "inner": {"depth": 2.5}}, ["2.5", "integer"]),
        ({}, ["'name' is missing"]),
    ],
)
def test_mistakes_are_named(mapping: dict[str, object], fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(Outer, mapping, "my.yaml")
    for fragment in ["my.yaml", *fragments]:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "target", ["", "os.system", "anchorformer.selectors.nowhere.X", "anchorformer.selectors.anchor.Missing",
               "anchorformer.selectors.base.Selector", "anchorformer.selectors.anchor"],
)  # fmt: skip
def test_plugins_stay_in_their_package(target: str) -> None:
    with pytest.raises(UserError, match="_target_"):
        parse_plugin(SelectorConfig, {"_target_": target}, "anchorformer.selectors", "selector")


def test_plugin_round_trip() -> None:
    config = AnchorSelectorConfig(num_anchors=17)
    again = parse_plugin(SelectorConfig, plugin_to_plain(config), "anchorformer.selectors", "selector")
    assert again == config


def test_user_error_survives_pickling_and_exits_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError("broken", found=1, expected=2, remedy="mend it")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_guarded(fail)
    assert caught.value.code == 2
    assert "mend it" in capsys.readouterr().err
