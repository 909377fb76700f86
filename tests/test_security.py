"""No code from data: nothing is unpickled, evaluated or fetched to be run, and no source reads outside of its root."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from anchorformer.errors import UserError
from anchorformer.schema import parse_plugin
from data.images import load
from data.sources.base import PACKAGE, SourceConfig
from tests.spoilt import encoded, spoken

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("anchorformer", "data", "evals", "train", "miniworld", "bench")

FORBIDDEN = {"eval", "exec", "compile", "os.system", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load",
             "yaml.unsafe_load", "marshal.loads", "torch.hub.load", "joblib.load"}  # fmt: skip
REQUIRED = {"torch.load": ("weights_only", True)}
FIXED = {"trust_remote_code": False, "shell": False, "allow_pickle": False, "weights_only": True}
"""Keywords that may be given one value only, wherever they stand."""


def _calls() -> Iterator[tuple[str, str, dict[str, ast.expr]]]:
    """Where every call of the program stands, what is called, and its keywords."""
    for path in (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                yield place, ast.unparse(node.func), {word.arg: word.value for word in node.keywords if word.arg}


def test_no_call_runs_what_a_file_says() -> None:
    found = []
    for place, name, keywords in _calls():
        given = {word: getattr(value, "value", ...) for word, value in keywords.items()}
        wrong = [word for word, value in FIXED.items() if word in given and given[word] is not value]
        if name in REQUIRED and given.get(REQUIRED[name][0]) is not REQUIRED[name][1]:
            wrong.append(REQUIRED[name][0])
        if name in FORBIDDEN or wrong:
            found.append(f"{place}: {name} {wrong}")
    assert found == []


def test_such_calls_would_be_found() -> None:
    assert any(name == "torch.load" and "weights_only" in keywords for _, name, keywords in _calls())
    assert any("trust_remote_code" in keywords for _, _, keywords in _calls())


TARGETS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "llava": ({"annotations": "x.json"}, "x.json", [{"image": "link/secret.png", "conversations": spoken()}]),
    "vqa": ({"annotations": "x.json"}, "x.json", [{"image": "link/secret.png", "question": "?", "answer": "a"}]),
    "docvqa": ({"split": "val", "folder": "."}, "val_v1.0.json",
               {"data": [{"image": "link/secret.png", "question": "?", "answers": ["a"]}]}),
    "chartqa": ({"split": "val", "folder": ".", "kinds": ["human"]}, "val/val_human.json",
                [{"imgname": "link/secret.png", "query": "?", "label": "a"}]),
    "huggingface": ({"dataset": "rows", "question": "q", "answers": "a"}, "", None),
}  # fmt: skip


@pytest.mark.parametrize("form", sorted(TARGETS))
def test_no_source_follows_a_link_out_of_its_root(tmp_path: Path, form: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(encoded("PNG"))
    options, file, content = TARGETS[form]
    images = root / ("val/png" if form == "chartqa" else ".")
    images.mkdir(parents=True)
    (images / "link").symlink_to(outside)
    if content is None:
        rows = {"image": [{"bytes": None, "path": "link/secret.png"}], "q": ["?"], "a": ["a"]}
        (root / "rows").mkdir()
        datasets.Dataset.from_dict(rows).to_parquet(str(root / "rows/x.parquet"))
    else:
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(json.dumps(content))
    spec = {"_target_": f"data.sources.{form}.{form.capitalize()}Config", **options}
    source = parse_plugin(SourceConfig, spec, PACKAGE, "here").open("x", root, tmp_path / "cache")
    (ref,) = source[0].images
    with pytest.raises(UserError, match="outside its root"):
        load(ref)
