"""Puts visual embeddings at their placeholders; the counts must agree."""

from __future__ import annotations

from torch import Tensor

from anchorformer.errors import UserError


def fuse(embeds_BSD: Tensor, input_ids_BS: Tensor, visual_XTD: Tensor, image_token_id: int) -> Tensor:
    """Replaces the embedding of every placeholder by the next visual embedding, in order over the batch.

    Args:
        embeds_BSD: text embeddings (B, S, D); rows at placeholders are overwritten.
        input_ids_BS: ids (B, S) with one `image_token_id` per visual embedding.
        visual_XTD: X images with T embeddings each, in the order of their placeholders.

    Returns:
        (B, S, D), differentiable with respect to both inputs.

    Raises:
        UserError: as many placeholders as visual embeddings are needed; both counts are named.
    """
    mask_BS = input_ids_BS == image_token_id
    placeholders, provided = int(mask_BS.sum()), visual_XTD.shape[0] * visual_XTD.shape[1]
    if placeholders != provided:
        raise UserError(
            "image placeholders and visual embeddings do not match",
            found=f"{placeholders} placeholders for {provided} embeddings "
            f"({visual_XTD.shape[0]} images x {visual_XTD.shape[1]})",
            expected="as many placeholders as embeddings",
            remedy="let the model folder's own processor expand <image>, and pass every image it was given",
        )
    return embeds_BSD.masked_scatter(mask_BS[..., None], visual_XTD.to(embeds_BSD.dtype))
