"""What is installed is the library and nothing else; importing it loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_wheel_holds_the_library_alone(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"anchorformer"}
    assert "anchorformer/py.typed" in names
    for path in (ROOT / "anchorformer").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names


def test_importing_the_library_is_cheap() -> None:
    script = "import sys, anchorformer, anchorformer.schema, train.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_importing_auto_registers_the_classes() -> None:
    script = (
        "import anchorformer.auto; from transformers import AutoConfig; "
        "print(type(AutoConfig.for_model('anchorformer')).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "AnchorFormerConfig"
