"""Every connector on two ranks under ZeRO-3, one of them without images: loss and gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Assemble
from tests.test_every_combination import CONNECTORS
from tests.train.cases import FINETUNE
from tests.train.ranks import Ranks
from tests.train.test_gradients import assert_same, gradients, plain_gradients

WITHOUT_DROPOUT = {"dropout": 1e-9}
"""Its draws depend on the deal; 0 is not allowed where queries start equal."""
TEXT_ONLY_RANK = [[[0, 1, 2], [6, 7]], [[3, 4], [5]]]


@pytest.mark.slow
@pytest.mark.parametrize("connector", CONNECTORS)
def test_ranks_with_and_without_images_stay_in_step(assemble_tiny: Assemble, pair: Ranks, connector: str) -> None:
    spec = CONNECTORS[connector]
    spec = spec | {key: value for key, value in WITHOUT_DROPOUT.items() if key in spec}
    folder = assemble_tiny(connector=spec)
    one_process: Any = plain_gradients(folder, [[list(range(8))]], FINETUNE)
    found = pair.run(gradients, folder=str(folder), deal=TEXT_ONLY_RANK, trains=FINETUNE, zero=3)
    assert_same(found[0], one_process)
