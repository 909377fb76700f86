"""The model: vision tower -> selector -> connector -> fusion -> language model, as a Hugging Face model.

An integration, where there is one, stands beside the connector and is heard by layers of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.contracts import VisionFeatures
from anchorformer.errors import UserError
from anchorformer.fusion import fuse
from anchorformer.generation import ImageGenerationMixin
from anchorformer.images import normalise
from anchorformer.integrations.base import (
    ARGUMENT,
    Integration,
    Placed,
    Rows,
    place,
    placed_nowhere,
)
from anchorformer.kernels.attention import FLAT_MASK, TEXT_ATTENTION
from anchorformer.lean import make_lean
from anchorformer.parts import parse_integration, parse_parts, parse_tiling
from anchorformer.views import build_integration, build_selector, embeddings_per_view, join_tiles
from anchorformer.vision import VisionTower


class AnchorFormerForConditionalGeneration(PreTrainedModel, ImageGenerationMixin):
    """Answers in text about images, seen through visual anchors.

    `forward` takes one of two forms, never both:

    * flat, for training: all samples in one row (1, S) with `cu_seqlens`, no 2-D mask, no cache;
    * padded, for generation: (B, L) with a 2-D `attention_mask`, and a cache if wanted.

    In training mode vision tower and connector run exactly once per forward, on a zero image where the batch has none,
    so that ranks with and without images stay in step under ZeRO. That holds with tiles too: the tower takes all tiles
    of the batch at once, and the connector all views: every tile, or with `tiling.select=image` every image, where
    those with fewer tiles are padded and a mask hides it. Selectors have no parameters and may be called more often.
    """

    config_class = AnchorFormerConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True
    accepts_loss_kwargs = False
    """`forward` averages over its own targets; told otherwise, transformers' Trainer would not divide by the steps that
    it accumulates."""

    config: AnchorFormerConfig

    def __init__(self, config: AnchorFormerConfig) -> None:
        super().__init__(config)
        selector, connector = parse_parts(config.selector, config.connector)
        if config.image_token_id is None:
            raise UserError(
                "the model's configuration is incomplete", found="image_token_id=None",
                expected="the id that stands for an image embedding", remedy="assemble a model folder and load that",
            )  # fmt: skip
        self.image_token_id = config.image_token_id
        self.vision_tower = VisionTower.from_config(config.vision_config, selector.needs)
        tower = self.vision_tower
        self.tiling = parse_tiling(config.tiling)
        shape = tower.num_tokens, tower.num_heads, tower.has_cls
        self.num_image_tokens = embeddings_per_view(self.tiling, selector, connector, *shape)
        """Embeddings, and so placeholders, per view: a tile, or with `tiling.select=image` an image. None where that
        depends on what a tile shows, so that images have to be looked at before text is laid out."""
        self.selector = build_selector(self.tiling, selector, *shape)
        self.connector = connector.build(tower.width, config.text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(
            config.text_config, attn_implementation=TEXT_ATTENTION, dtype=self.dtype_of(config)
        )
        make_lean(self.language_model)
        integration = parse_integration(config.integration)
        self.integration = build_integration(
            integration, self.tiling, selector, tower, config.text_config, self.num_image_tokens
        )
        if self.integration is not None:
            self.integration.attach(self.language_model)
        self.post_init()

    @staticmethod
    def dtype_of(config: AnchorFormerConfig) -> torch.dtype:
        return config.dtype or torch.get_default_dtype()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tile_counts: Sequence[int] | None = None,
        vision_features: VisionFeatures | None = None,
        image_embeds: Tensor | None = None,
        placed: Placed | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids: (1, S) flat or (B, L) padded; a view stands as one placeholder per embedding.
            attention_mask: padded form only, (B, L), 1 at real positions.
            position_ids: like `input_ids`; restarting with each sample in the flat form.
            pixel_values: (tiles, 3, H, W) in order of their placeholders; uint8 is normalised here, floats are taken
                as normalised.
            tile_counts: tiles of each image, on the host; may be left out where all images have equally many.
            vision_features: what the vision tower says of these tiles, where that is known; it does not run then.
            image_embeds: what `encode_images` said of the images, instead of `pixel_values`; nothing visual runs then,
                so not while training.
            placed: what the integration reads of every image of every row, also where the row's beginning lies in the
                cache; `generate` passes it on from step to step. None makes it of the images that are given.
            cu_seqlens: flat form only, int32 (samples + 1,), borders of the samples.
            max_seqlen: flat form only, the longest sample.
            labels: padded form only, (B, L) with -100 where not supervised; adds the mean next-token loss.
            logits_to_keep: positions whose logits are wanted: an index tensor (Q,), the last n, or 0 for all.

        Returns:
            logits (B, L or Q, vocabulary), `past_key_values` in the padded form, `loss` if labels were given; as a
            tuple of what there is, loss first, with `return_dict=False`.

        Raises:
            UserError: both forms at once, images given twice, or placeholders and images that do not match; a cache
                without `placed` where there is an integration.
        """
        is_flat = cu_seqlens is not None
        if is_flat:
            _check_flat(input_ids, attention_mask, position_ids, max_seqlen, past_key_values, use_cache, labels)
            kwargs |= {
                "cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens,
                "max_length_q": max_seqlen, "max_length_k": max_seqlen,
            }  # fmt: skip
            attention_mask, use_cache = FLAT_MASK, False
        embeds_BSD = self.get_input_embeddings()(input_ids)
        visual_XED, is_blank = self._look(embeds_BSD.device, pixel_values, tile_counts, vision_features, image_embeds)
        embeds_BSD = self._fused(embeds_BSD, input_ids, visual_XED, is_blank)
        if self.integration is not None:
            before = 0 if past_key_values is None else past_key_values.get_seq_length()
            rows = Rows(input_ids.shape[1], before, cu_seqlens, max_seqlen)
            kwargs[ARGUMENT] = self._heard(self.integration, embeds_BSD, input_ids, visual_XED, is_blank, placed, rows)
        out: CausalLMOutputWithPast = self.language_model(
            inputs_embeds=embeds_BSD,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if labels is None:
            return out
        loss = self.loss_function(out.logits, labels, vocab_size=out.logits.shape[-1])
        return type(out)(**{**out, "loss": loss})

    def encode_images(
        self, pixel_values: Tensor, tile_counts: Sequence[int] | None = None,
        features: VisionFeatures | None = None,
    ) -> Tensor:  # fmt: skip
        """Visual embeddings of tiles (B, 3, H, W): (views, num_image_tokens, D), D the language model's width; end to
        end (R, D) where views have different numbers of them.

        With an integration there are more of each view: what that says of it stands behind them.

        Args:
            features: of these tiles, where they are known already.

        Raises:
            UserError: the tiles of the images do not add up to B.
        """
        return self.encode_views(pixel_values, tile_counts, features)[0]

    def encode_views(
        self, pixel_values: Tensor, tile_counts: Sequence[int] | None = None,
        features: VisionFeatures | None = None,
    ) -> tuple[Tensor, tuple[int, ...]]:  # fmt: skip
        """What `encode_images` says, and how many placeholders each view stands for."""
        counts = self._tile_counts(pixel_values.shape[0], tile_counts)
        if features is None:
            if pixel_values.dtype == torch.uint8:
                pixel_values = normalise(pixel_values, self.config.image_mean, self.config.image_std)
            features = self.vision_tower(pixel_values)
        if self.tiling.spans_tiles:
            features = join_tiles(features, counts)
        anchors = self.selector(features)
        embeds_XTD: Tensor = self.connector(anchors, features)
        if anchors.sizes is not None:
            return torch.cat([row[:size] for row, size in zip(embeds_XTD, anchors.sizes, strict=True)]), anchors.sizes
        own = (embeds_XTD.shape[1],) * embeds_XTD.shape[0]
        if self.integration is None:
            return embeds_XTD, own
        return torch.cat([embeds_XTD, self.integration(anchors, features).to(embeds_XTD.dtype)], dim=1), own

    def _tile_counts(self, tiles: int, given: Sequence[int] | None) -> Sequence[int]:
        if given is None and len(self.tiling.counts) == 1:
            each = self.tiling.counts[0]
            given = [each] * (tiles // each)
        if given is None and not self.tiling.spans_tiles:
            return ()  # every tile is a view of its own, whatever image it is of
        if given is None or sum(given) != tiles or not set(given) <= set(self.tiling.counts):
            raise UserError(
                "tiles and images do not match", found=f"{tiles} tiles, tile_counts={given}",
                expected=f"as many tiles as tile_counts add up to, each one of {self.tiling.counts}",
                remedy="pass what the model folder's own processor returns, tile_counts too",
            )  # fmt: skip
        return given

    def _look(
        self, device: torch.device, pixel_values: Tensor | None, tile_counts: Sequence[int] | None,
        features: VisionFeatures | None, image_embeds: Tensor | None,
    ) -> tuple[Tensor | None, bool]:  # fmt: skip
        """What is visible, as `encode_images` says it, and whether it is a blank that no placeholder stands for."""
        if image_embeds is not None:
            if pixel_values is not None or self.training:
                raise UserError(
                    "image_embeds were given where they cannot be used",
                    found="a model in training mode" if self.training else "pixel_values beside them",
                    expected="image_embeds alone, and model.eval()", remedy="pass only one of the two",
                )  # fmt: skip
            return image_embeds, False
        if pixel_values is not None and pixel_values.shape[0] > 0:
            return self.encode_images(pixel_values, tile_counts, features), False
        if not self.training:
            return None, False
        # A rank whose micro-batch is text only must still run the connector, or ZeRO's collectives go out of step.
        side, tiles = self.vision_tower.image_size, self.tiling.counts[0]
        blank = torch.zeros(tiles, 3, side, side, dtype=torch.uint8, device=device)
        if features is not None:  # and a rank with images does not run the tower either
            features = features.blank(tiles)
        return self.encode_images(blank, [tiles], features), True

    def _fused(self, embeds_BSD: Tensor, input_ids: Tensor, visual_XED: Tensor | None, is_blank: bool) -> Tensor:
        own_XTD = visual_XED
        if own_XTD is not None and self.integration is not None:
            own_XTD = own_XTD[:, : self.num_image_tokens]
        if own_XTD is not None and is_blank:
            embeds_BSD = embeds_BSD + (0.0 * own_XTD).sum().to(embeds_BSD.dtype)
        if own_XTD is None or is_blank:
            own_XTD = embeds_BSD.new_zeros(0, 1, embeds_BSD.shape[-1])
        return fuse(embeds_BSD, input_ids, own_XTD, self.image_token_id)

    def _heard(
        self, integration: Integration, embeds_BSD: Tensor, input_ids: Tensor, visual_XED: Tensor | None,
        is_blank: bool, placed: Placed | None, rows: Rows,
    ) -> Any:  # fmt: skip
        """What layers are handed beside the embeddings; None where no row has an image."""
        if placed is None and rows.before:
            raise UserError(
                "the integration does not know the images whose placeholders lie in the cache",
                found=f"{rows.before} positions in past_key_values, no `placed`", expected="what generate hands on",
                remedy="use model.generate, or forward without a cache",
            )  # fmt: skip
        direct_BSD, own = None, self.num_image_tokens
        assert own is not None, "integrations take views of one size"
        if visual_XED is not None:
            direct_XTD, said_XED = integration.split(visual_XED[:, own:], own)
            if is_blank:
                num_rows = len(input_ids) if rows.cu_seqlens is None else rows.cu_seqlens.numel() - 1
                placed = placed_nowhere(said_XED, num_rows)
            elif placed is None:
                mask_BS = input_ids == self.image_token_id
                placed = place(said_XED, mask_BS, own, rows.cu_seqlens)
            if direct_XTD is not None:
                direct_XTD = direct_XTD[:0] if is_blank else direct_XTD
                direct_BSD = fuse(torch.zeros_like(embeds_BSD), input_ids, direct_XTD, self.image_token_id)
        return integration.argument(placed, rows, direct_BSD) if placed is not None and len(placed.said_XED) else None

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The backbones initialise themselves; a fresh connector is initialised as published, that is as PyTorch does.
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


def _check_flat(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, max_seqlen: int | None,
    past_key_values: Any, use_cache: bool | None, labels: Tensor | None,
) -> None:  # fmt: skip
    forbidden = {
        "attention_mask": attention_mask is not None, "past_key_values": past_key_values is not None,
        "use_cache": bool(use_cache), "labels": labels is not None,
    }  # fmt: skip
    wrong = [name for name, is_given in forbidden.items() if is_given]
    missing = [name for name, value in (("position_ids", position_ids), ("max_seqlen", max_seqlen)) if value is None]
    if wrong or missing or input_ids.shape[0] != 1:
        raise UserError(
            "forward was called in neither its flat nor its padded form",
            found=f"cu_seqlens with input_ids {tuple(input_ids.shape)}; too much: {wrong}; missing: {missing}",
            expected="flat: input_ids (1, S), position_ids, cu_seqlens, max_seqlen, no mask, no cache, no labels; "
            "padded: input_ids (B, L) and attention_mask, no cu_seqlens",
            remedy="pass one form only; a 2-D mask or a cache beside cu_seqlens would let samples see each other",
        )


AutoModelForImageTextToText.register(AnchorFormerConfig, AnchorFormerForConditionalGeneration)
