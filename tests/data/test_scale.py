"""As many records as LLaVA-665k has: opened again in seconds, with little memory of a worker's own."""

from __future__ import annotations

import pytest

from bench import records
from bench.runner import Size


@pytest.mark.slow
def test_665k_records_open_in_seconds_and_in_little_memory() -> None:
    time, memory = records.rows(Size.full)
    assert time.equal
    assert time.met, f"{time.new:.1f} s of CPU"
    assert memory.met, f"{memory.new:.0f} MB"
