"""Fixtures of the training tests: one pair of ranks for the whole session, tiny data, and run folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from anchorformer.model_folder import MANIFEST, sha256
from anchorformer.schema import to_plain
from tests.train.cases import run_config
from tests.train.ranks import Ranks
from train.run.folder import RunFolder

MakeRun = Callable[..., RunFolder]


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    """Two ranks joined by gloo; they start with the first job."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four conversations in LLaVA's format, one in six without an image."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    records = []
    for number in range(24):
        shade = (number * 10, 255 - number * 9, number * 37 % 256)
        question, answer = "what color is the star?", f"{'red ' * (1 + number % 5)}{number}"
        record = {"id": f"r{number}", "conversations": [
            {"from": "human", "value": question}, {"from": "gpt", "value": answer},
        ]}  # fmt: skip
        if number % 6:
            Image.new("RGB", (40, 30), shade).save(root / "images" / f"{number}.png")
            record |= {"image": f"{number}.png"}
            record["conversations"][0]["value"] = f"<image>\n{question}"  # type: ignore[index]
        records.append(record)
    (root / "mix.json").write_text(json.dumps(records))
    return root


@pytest.fixture
def make_run(tiny_folder: Path, tiny_data: Path, tmp_path: Path) -> MakeRun:
    """Prepares a run folder as `python -m train` would: `make_run(name, trains, zero__stage=3, ...)`."""
    return partial(write_run, tmp_path, tiny_folder, tiny_data)


def launch_again(folder: RunFolder, **values: Any) -> None:
    """What `python -m train` does with a folder that is there: it writes other values, and counts one launch more."""
    config = {**yaml.safe_load(folder.config.read_text()), **values}
    earlier = json.loads(folder.environment.read_text())
    folder.write_sealed({
        folder.environment.name: json.dumps({"before": [*earlier.pop("before"), earlier]}),
        folder.config.name: yaml.safe_dump(config),
    })  # fmt: skip


def write_run(root: Path, start: Path, data: Path, name: str, trains: dict[str, Any], **changes: Any) -> RunFolder:
    """A run folder below `root` that ranks can be started on."""
    model = {"tiling": {}, **json.loads((start / "config.json").read_text())}
    parts = {key: model[key] for key in ("selector", "connector", "tiling", "integration")}
    config = run_config(
        trains,
        run=name,
        model={"vision": "-", "language_model": "-", **parts},
        data={
            "root": str(data), "cache_dir": str(data / "cache"),
            "sources": {"mix": {"_target_": "data.sources.llava.LlavaConfig", "annotations": "mix.json",
                                "images": "images"}},
        },
        output_root=str(root),
        **{"stage__template": "chat", "stage__global_batch": 4, "stage__max_steps": 6, "hardware__micro_batch": 2,
           "hardware__threads": 1, **changes},
    )  # fmt: skip
    folder = RunFolder(root / name)
    folder.path.mkdir()
    folder.write_sealed({
        "start.txt": f"{start}\n{sha256(start / MANIFEST)}\n", "environment.json": '{"before": []}\n',
        "config.yaml": yaml.safe_dump(to_plain(config)),
    })  # fmt: skip
    return folder
