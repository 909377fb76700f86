"""Fixtures of the training tests: one pair of ranks for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.train.ranks import Ranks


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    """Two ranks joined by gloo; they start with the first job."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()
