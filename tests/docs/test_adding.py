"""The recipes in docs/adding.md: its connector builds and its task composes, so that the page cannot rot."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from anchorformer.connectors.base import PACKAGE as CONNECTORS
from anchorformer.connectors.base import ConnectorConfig
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.schema import parse_plugin
from anchorformer.selectors.base import PACKAGE as SELECTORS
from anchorformer.selectors.base import SelectorConfig
from evals.tasks.base import PACKAGE as TASKS
from evals.tasks.base import TaskConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "adding.md").read_text("utf-8")


def yaml_blocks(page: str) -> dict[str, dict[str, Any]]:
    """The blocks that begin with the name of their file, by that name."""
    blocks = re.findall(r"```yaml\n# (conf/\S+)\n(.*?)```", page, re.DOTALL)
    assert blocks
    return {name: yaml.safe_load(text) for name, text in blocks}


def written(page: str, name: str, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the block of Python that defines `name`, as the module that the YAML names."""
    (source,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if f"class {name}(" in text)
    module = ModuleType(spec["_target_"].rpartition(".")[0])
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "docs/adding.md", "exec"), module.__dict__)


def test_the_connector_of_the_page_is_one(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = yaml_blocks(page)["conf/connector/gated_mlp.yaml"]
    written(page, "GatedMlp", spec, monkeypatch)
    connector = parse_plugin(ConnectorConfig, spec, CONNECTORS, "connector").build(8, 16)
    tokens = torch.randn(2, 5, 8)
    out = connector(Anchors(tokens, None), VisionFeatures(tokens, None, True))
    out.sum().backward()
    assert out.shape == (2, 5, 16)
    assert all(parameter.grad is not None for parameter in connector.parameters())


def test_the_selector_of_the_page_is_one(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = yaml_blocks(page)["conf/selector/norm.yaml"]
    written(page, "NormSelector", spec, monkeypatch)
    config = parse_plugin(SelectorConfig, spec | {"num_anchors": 3}, SELECTORS, "selector")
    tokens = torch.tensor([[[9.0], [1.0], [-3.0], [2.0], [2.0]]])
    anchors = config.build(5, 1, True)(VisionFeatures(tokens, None, True))
    assert anchors.indices_BT is not None
    assert anchors.indices_BT.tolist() == [[0, 2, 3]]


def test_the_task_of_the_page_parses(page: str) -> None:
    spec = yaml_blocks(page)["conf/eval/my_receipts.yaml"]
    assert parse_plugin(TaskConfig, spec, TASKS, "task").describe()["metric"] == "anls"


def test_every_file_and_folder_that_the_pages_name_exists() -> None:
    made_up = re.compile(r"NAME|STAGE|my_|gated_mlp|<|\*")
    for name in ("docs/adding.md", "docs/methods.md", "docs/numerics.md", "docs/architecture.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text("utf-8")
        named = set(
            re.findall(r"`((?:anchorformer|data|train|evals|conf|tests|docs|launch|miniworld)/[\w./*<>-]+)`", text)
        )
        missing = sorted(path for path in named if not made_up.search(path) and not (ROOT / path).exists())
        assert not missing, f"{name}: {missing}"
