"""The folded connector in a run: an option of the run, whatever the folder says, and refused where it cannot work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.errors import UserError
from anchorformer.weights import check_folder, load_model
from train.compose import compose
from train.config import ZeroConfig


def test_zero3_is_refused() -> None:
    config = compose(["stage=align", "zero=zero2", "data.root=/data", "model.connector.fold_kv=true"])
    with pytest.raises(UserError, match="ZeRO-3"):
        dataclasses.replace(config, zero=ZeroConfig(stage=3))


def test_a_folder_takes_the_option_of_the_run_and_keeps_its_weights(tiny_folder: Path) -> None:
    plain = AnchorFormerConfig.from_pretrained(tiny_folder).connector
    folded = {**plain, "fold_kv": True}
    check_folder(tiny_folder, connector=folded)
    model, stock = load_model(tiny_folder, torch.float32, folded), load_model(tiny_folder, torch.float32)
    assert (model.connector.fold_kv, stock.connector.fold_kv) == (True, False)
    images = torch.randint(0, 256, (2, 3, model.vision_tower.image_size, model.vision_tower.image_size)).byte()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_images(images), stock.encode_images(images), atol=1e-5, rtol=1e-5)
