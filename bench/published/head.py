"""The published language model head: logits of every position in fp32, shifted, then the mean loss."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from anchorformer.contracts import IGNORE_INDEX


def loss(hidden_BLD: Tensor, lm_head: nn.Module, labels_BL: Tensor) -> Tensor:
    """Mean next-token loss over supervised positions of the batch, after all B x L rows of logits were computed.

    Source: the Llama model of transformers 4.37, which LLaVA-1.5 and AnchorFormer train.

    Args:
        hidden_BLD: last hidden states of a padded batch.
        labels_BL: the ids themselves, IGNORE_INDEX where not supervised; shifted here.
    """
    logits = lm_head(hidden_BLD).float()
    shifted = logits[:, :-1].contiguous()
    targets = labels_BL[:, 1:].contiguous()
    return F.cross_entropy(shifted.view(-1, shifted.shape[-1]), targets.view(-1), ignore_index=IGNORE_INDEX)
