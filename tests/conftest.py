"""Fixtures that several rooms share: where the golden vectors and the small real datasets lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT / default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"{variable}: no folder {folder}; set the variable to the folder with these files")
    return folder


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """Vectors produced by running the published reference code."""
    return _folder("ANCHORFORMER_GOLDEN", "../shared/golden")


@pytest.fixture(scope="session")
def realdata_root() -> Path:
    """Small real datasets in their native formats."""
    return _folder("ANCHORFORMER_REALDATA", "../shared/realdata")
