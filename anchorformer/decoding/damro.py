"""DAMRO decoding: logits are contrasted with those of the same prompt about the [CLS] outlier tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.decoding.base import Decoding, DecodingConfig, Sight
from anchorformer.errors import UserError
from anchorformer.images import normalise
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.parts import parse_parts
from anchorformer.selectors.base import anchors_at, needed


@dataclass(frozen=True, kw_only=True)
class DamroConfig(DecodingConfig):
    """Experimental; the defaults are those of the released command line."""

    alpha: Annotated[float, Field(ge=0)] = 2.0
    """How far away from the contrast: 0 is greedy. The released scripts use 0.5, 1.5 and 2."""
    top_k: Annotated[int, Field(ge=1)] = 10
    """Outlier tokens of a tile; the released scripts use 4 and 10."""
    beta: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Tokens whose probability is below this share of the most probable one's are never said."""
    layer: int | None = None
    """Layer whose block's [CLS] attention tells the outliers, counted like a selector's; null is that one, as
    published."""

    def build(self, model: AnchorFormerForConditionalGeneration) -> Damro:
        """
        Raises:
            UserError: no [CLS], fewer patches than outliers, a layer that was cut off, several tiles as one view, or an
                integration.
        """
        tower = model.vision_tower
        patches = tower.num_tokens - tower.has_cls
        if not tower.has_cls or self.top_k > patches:
            raise UserError(
                "the vision tower has no such outlier tokens",
                found=f"{patches} patches" if tower.has_cls else "no [CLS]",
                expected=f"[CLS], and {self.top_k} patches or more", remedy="decode greedily, or lower decoding.top_k",
            )  # fmt: skip
        if model.tiling.spans_tiles:
            raise UserError(
                "outlier tokens are those of a tile", found="tiling.select=image: all tiles of an image are one view",
                expected="tiling.select=tile", remedy="decode this model greedily",
            )  # fmt: skip
        if model.integration is not None:
            raise UserError(
                "a contrast of outlier tokens alone has no counterpart where layers read every visual token",
                found="a model with an integration", expected="integration=none", remedy="decode this model greedily",
            )  # fmt: skip
        return Damro(model, self)


class Damro(Decoding):
    """logits = (1 + alpha) l - alpha l', where l' comes of a prompt whose image is its outlier tokens and nothing else.

    Outliers are the patches with the largest attention of [CLS], in descending order, with all heads as one: softmax(q
    k^T / sqrt(V)). What the connector makes of them stands for the image in l': of connectors that take tokens as they
    come, queries, keys and values are the outliers alone; others get the raster with zeros for every other token.

    A prompt without images has no contrast and is answered greedily. The contrast has a key-value cache of its own.
    Source: DAMRO, arXiv 2410.04514, and its code, where the image is LLaVA's projected tokens.
    """

    def __init__(self, model: AnchorFormerForConditionalGeneration, config: DamroConfig) -> None:
        super().__init__(model)
        self.config = config
        _, connector = parse_parts(model.config.selector, model.config.connector)
        tower, own = model.vision_tower, model.vision_tower.needs
        layer = own.layer if config.layer is None else config.layer
        front, taps = tower.counted_from_front(layer), [tower.counted_from_front(each) for each in own.qk]
        # Behind those of the selector, which finds its own where it expects them.
        self._tap = taps.index(front) if front in taps else len(taps)
        qk = own.qk if front in taps else (*own.qk, layer)
        self._tower = tower.retapped(replace(own, qk=qk))
        self._has_raster = not connector.spans_tiles

    @torch.no_grad()
    def see(
        self, tiles_B3HW: Tensor, tile_counts: Sequence[int] | None = None, features: VisionFeatures | None = None
    ) -> Sight:
        """
        Raises:
            UserError: `features`, which do not hold what tells the outliers.
        """
        if features is not None:
            raise UserError(
                "outlier tokens are not in a feature cache", found="features that are known already",
                expected="the vision tower itself", remedy="set data.feature_cache=null",
            )  # fmt: skip
        model = self.model
        features = self._tower(normalise(tiles_B3HW, model.config.image_mean, model.config.image_std))
        return Sight(*model.encode_views(tiles_B3HW, tile_counts, features), self._contrast(features))

    def logits_processors(self, input_ids_BL: Tensor, mask_BL: Tensor, sight: Sight | None) -> LogitsProcessorList:
        if sight is None or sight.contrast_XKD is None:
            return LogitsProcessorList()
        return LogitsProcessorList([Contrast(self.model, self.config, input_ids_BL, mask_BL, sight)])

    def _contrast(self, features: VisionFeatures) -> Tensor:
        """Embeddings of an image that is nothing but outlier tokens: (tiles, K, D)."""
        query_BV, keys_BNV = (needed(x)[:, self._tap] for x in (features.query_BLV, features.keys_BLNV))
        indices_BK = outlier_indices(query_BV, keys_BNV, self.config.top_k)
        outliers = anchors_at(features, indices_BK)
        if self._has_raster:
            is_shown_BN = torch.zeros_like(keys_BNV[..., 0]).scatter(1, indices_BK, 1.0)
            shown = VisionFeatures(features.tokens_BNV * is_shown_BN.unsqueeze(-1), None, has_cls=features.has_cls)
        else:
            shown = VisionFeatures(outliers.tokens_BTV, None, has_cls=False)
        embeds_XKD: Tensor = self.model.connector(Anchors(outliers.tokens_BTV, None), shown)
        return embeds_XKD


def outlier_indices(query_BV: Tensor, keys_BNV: Tensor, top_k: int) -> Tensor:
    """Patches by descending attention of [CLS], as indices into N; the lower one first where attention is equal.

    Args:
        query_BV: of [CLS], heads side by side; they are one head here.
        keys_BNV: of [CLS] and patches.
    """
    # The softmax over these and the scale of the products keep their order.
    logits_BP = torch.einsum("bnv,bv->bn", keys_BNV.float(), query_BV.float())[:, 1:]
    return 1 + logits_BP.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def contrasted(logits_BD: Tensor, other_BD: Tensor, alpha: float, beta: float) -> Tensor:
    """(1 + alpha) logits - alpha other, and -inf for tokens less probable than `beta` times the most probable one."""
    lowest_B1 = logits_BD.max(-1, keepdim=True).values + torch.tensor(beta).log()
    return ((1 + alpha) * logits_BD - alpha * other_BD).masked_fill(logits_BD < lowest_B1, -torch.inf)


class Contrast(LogitsProcessor):
    """Reads one batch of prompts a second time, with the outlier tokens in the place of their images, and goes along.

    Rows whose prompt shows no image keep their logits.
    """

    def __init__(
        self, model: AnchorFormerForConditionalGeneration, config: DamroConfig, input_ids_BL: Tensor, mask_BL: Tensor,
        sight: Sight,
    ) -> None:  # fmt: skip
        self._model, self._config = model, config
        self._embeds_XKD = needed(sight.contrast_XKD)
        self._is_about_images_B = (input_ids_BL == model.image_token_id).any(1)
        self._ids_BL, self._mask_BL = self._prompt(input_ids_BL, mask_BL, sight.counts)
        self._cache = DynamicCache()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """
        Args:
            input_ids: (B, S), the prompt and what has been said so far.
            scores: (B, D), logits of the next token.

        Raises:
            UserError: more rows than prompts: beams or several answers, which would each need a contrast of its own.
        """
        if len(input_ids) != len(self._mask_BL):
            raise UserError(
                "DAMRO follows one answer to each prompt",
                found=f"{len(input_ids)} rows of {len(self._mask_BL)} prompts",
                expected="num_beams=1 and num_return_sequences=1", remedy="decode with beams greedily",
            )  # fmt: skip
        is_first = self._cache.get_seq_length() == 0
        if not is_first:
            self._mask_BL = torch.cat([self._mask_BL, self._mask_BL.new_ones(len(input_ids), 1)], dim=1)
        ids_BS = self._ids_BL if is_first else input_ids[:, -1:]
        places_BL = (self._mask_BL.cumsum(1) - 1).clamp(min=0)
        other_BD = self._model(
            input_ids=ids_BS, attention_mask=self._mask_BL, position_ids=places_BL[:, -ids_BS.shape[1] :],
            image_embeds=self._embeds_XKD if is_first else None, past_key_values=self._cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1].to(scores)  # fmt: skip
        changed_BD = contrasted(scores, other_BD, self._config.alpha, self._config.beta)
        return torch.where(self._is_about_images_B[:, None], changed_BD, scores)

    def _prompt(self, input_ids_BL: Tensor, mask_BL: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The prompts with as many placeholders for a view as it has embeddings here, and their mask; left-padded."""
        shown, device = self._embeds_XKD.shape[1], input_ids_BL.device
        begins_R = torch.tensor(
            [begins for count in counts for begins in [True] + [False] * (count - 1)], device=device
        )
        is_image_BL = input_ids_BL == self._model.image_token_id
        times_BL = torch.ones_like(input_ids_BL).masked_scatter(is_image_BL, begins_R * shown) * mask_BL
        rows = [ids_L.repeat_interleave(times_L) for ids_L, times_L in zip(input_ids_BL, times_BL, strict=True)]
        padding = int(self._model.image_token_id == 0)  # any id that stands for no embedding
        masks = [mask_BL.new_ones(len(row)) for row in rows]
        ids_BL = pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")
        mask_BL = pad_sequence(masks, batch_first=True, padding_side="left")
        return ids_BL, mask_BL
