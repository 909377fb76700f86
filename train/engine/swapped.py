"""What ZeRO-3 keeps on NVMe, brought to the host for the trainer and back again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Swapped:
    """The subgroups of an optimizer whose fp32 weights and moments are files between steps.

    DeepSpeed swaps whole subgroups, and leaves those of less than a megabyte in memory. The names it is asked by are
    private to 0.19, the pinned series; `tests/train/test_nvme.py` watches them.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def holds(self, index: int) -> bool:
        """Whether the subgroup of this number is swapped."""
        is_swapped: bool = self._zero._swappable_optimizer_subgroup(index)
        return is_swapped

    @contextmanager
    def on_host(self, index: int, *, changes: bool) -> Iterator[None]:
        """Inside, the subgroup's master and its state are tensors of their size, whether it is swapped or not.

        Args:
            changes: whether what is written into them is kept.
        """
        if not self.holds(index):
            yield
            return
        self._zero._optimizer_states_and_gradient_swap_in(index)
        try:
            yield
        finally:
            if changes:
                self._zero._optimizer_states_and_gradient_swap_out(index)
            else:
                self._zero._release_swap_buffers(index)


def own_part(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a ZeRO-3 parameter, flattened; a copy where it is a file."""
    part: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    swapper: Any = getattr(parameter, "nvme_swapper", None)
    if swapper is None or part.final_location != "nvme":
        view: Tensor = part.view(-1)
        return view
    swapper.swap_in([parameter], async_op=False)
    copy: Tensor = part.detach().clone().view(-1)
    swapper.remove_partition_and_release_buffers([parameter])
    return copy
