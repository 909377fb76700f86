"""DeepSpeed's door to the disk: remembers what was written, keeps failures for all ranks to hear, runs no pickle."""

from __future__ import annotations

import pickle
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from anchorformer.errors import UserError
from train.writing import cannot_write


class Files:
    """Stands in for the `save` and `load` of DeepSpeed's checkpoint engine."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forgets what an earlier save has written."""
        self.written: list[Path] = []
        self.problem: UserError | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Writes a file; where that fails, the ranks that wait at DeepSpeed's next barrier are not left alone."""
        try:
            torch.save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's writer of zip files calls a full disk a RuntimeError
            self.problem = cannot_write(Path(path), error)
        self.written.append(Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads a file without DeepSpeed's permission to run whatever it says.

        Raises:
            UserError: it holds something else than tensors and plain values; nothing of that has been run.
        """
        try:
            with plain_pickles():
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path} is not only weights, and was not loaded", found=str(error).strip().splitlines()[0],
                expected="tensors and plain values", remedy="find out who wrote it; resume from another checkpoint",
            ) from None  # fmt: skip


def plain_pickles() -> AbstractContextManager[None]:
    """Inside, `weights_only` reading also knows the few plain classes that DeepSpeed puts into its files."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
