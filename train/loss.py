"""The training objective: token losses summed over supervised positions, divided by the whole step's count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from anchorformer.contracts import Batch
from anchorformer.kernels.cross_entropy import cross_entropy_sum


def supervised_loss(forward: Callable[..., Any], batch: Batch, step_supervised: int) -> Tensor:
    """This micro-batch's share of the step's mean token loss.

    The divisor is the number of supervised tokens of the *whole* optimizer step (all ranks, all micro-batches), so that
    the sum of all shares is the mean over tokens however the samples were dealt; a mean of means would weigh a token by
    the company it keeps.

    Args:
        forward: the model or an engine around it, called in the flat form.
        batch: on the model's device.
        step_supervised: supervised tokens of the step; 0 where no sample has a target.

    Returns:
        fp32 scalar with a graph; 0 for a batch without targets.
    """
    out = forward(
        input_ids=batch.input_ids_S[None],
        position_ids=batch.position_ids_S[None],
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        pixel_values=batch.tiles_B3HW,
        tile_counts=batch.tile_counts,
        vision_features=batch.features,
        logits_to_keep=batch.predict_index_Q,
    )
    # The sum over no targets is 0 with a graph (the mean would be NaN): empty micro-batches need no case of their own.
    return cross_entropy_sum(out.logits[0], batch.targets_Q) / max(step_supervised, 1)
