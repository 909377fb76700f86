"""Fixtures of the training tests: one pair of ranks for the whole session, tiny data, and run folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from anchorformer.schema import to_plain
from tests.train.cases import run_config
from tests.train.ranks import Ranks
from train.folder import RunFolder

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

    def make(name: str, trains: dict[str, Any], **changes: Any) -> RunFolder:
        model = json.loads((tiny_folder / "config.json").read_text())
        config = run_config(
            trains,
            run=name,
            model={"vision": "-", "language_model": "-", **{key: model[key] for key in ("selector", "connector")}},
            data={
                "root": str(tiny_data), "cache_dir": str(tiny_data / "cache"),
                "sources": {"mix": {"_target_": "data.sources.llava.LlavaConfig", "annotations": "mix.json",
                                    "images": "images"}},
            },
            output_root=str(tmp_path),
            **{"stage__template": "chat", "stage__global_batch": 4, "stage__max_steps": 6, "hardware__micro_batch": 2,
               "hardware__threads": 1, **changes},
        )  # fmt: skip
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        folder.config.write_text(yaml.safe_dump(to_plain(config)))
        (folder.path / "start.txt").write_text(f"{tiny_folder}\n")
        return folder

    return make
