"""Puts visual embeddings at their placeholders; the counts must agree."""

from __future__ import annotations

import torch
from torch import Tensor

from anchorformer.errors import UserError


def fuse(embeds_BSD: Tensor, input_ids_BS: Tensor, visual_RD: Tensor, image_token_id: int) -> Tensor:
    """Replaces the embedding of every placeholder by the next visual embedding, in order over the batch.

    Args:
        embeds_BSD: text embeddings (B, S, D); rows at placeholders are overwritten.
        input_ids_BS: ids (B, S) with one `image_token_id` per visual embedding.
        visual_RD: R embeddings, image after image in the order of their placeholders; or of X images with T embeddings
            each (X, T, D).

    Returns:
        (B, S, D), differentiable with respect to both inputs.

    Raises:
        UserError: as many placeholders as visual embeddings are needed; both counts are named. While training on a
            device the host does not wait for the count, and the device stops with an assertion instead.
    """
    mask_BS = input_ids_BS == image_token_id
    visual_RD = visual_RD.flatten(0, -2)
    provided = visual_RD.shape[0]
    check_counts(mask_BS, provided)
    if provided == 0:
        return embeds_BSD
    # The k-th placeholder takes the k-th embedding. Every position looks one up, so that no shape depends on the ids:
    # a masked scatter would make the host wait for their number in backward.
    number_S = (mask_BS.flatten().cumsum(0) - 1).clamp_(min=0, max=provided - 1)
    visual_BSD = visual_RD.index_select(0, number_S).view_as(embeds_BSD)
    return torch.where(mask_BS[..., None], visual_BSD.to(embeds_BSD.dtype), embeds_BSD)


def check_counts(mask_BS: Tensor, provided: int) -> None:
    """As many placeholders as visual embeddings.

    Raises:
        UserError: as `fuse`.
    """
    if torch.is_grad_enabled() and mask_BS.device.type == "cuda":
        torch._assert_async(mask_BS.sum() == provided, "image placeholders and visual embeddings do not match")
        return
    placeholders = int(mask_BS.sum())
    if placeholders != provided:
        raise UserError(
            "image placeholders and visual embeddings do not match",
            found=f"{placeholders} placeholders for {provided} embeddings",
            expected="as many placeholders as embeddings",
            remedy="let the model folder's own processor expand <image>, and pass every image it was given",
        )
