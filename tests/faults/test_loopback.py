"""The faults that need only loopback, in a session of their own beside this one: `make faults` has them one by one."""

from __future__ import annotations

import pytest

from tests.products import Beside

pytestmark = pytest.mark.beside("loopback")


def test_every_fault_over_loopback(beside: Beside) -> None:
    assert " passed" in beside.said()
