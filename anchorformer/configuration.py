"""The model's configuration as Hugging Face keeps it: two backbones, the selector and connector between them."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class AnchorFormerConfig(PreTrainedConfig):
    """Configuration of `AnchorFormerForConditionalGeneration`.

    Args:
        vision_config: the vision tower's own configuration (CLIP, DINOv2 or SigLIP shaped), untrimmed.
        text_config: the language model's own configuration.
        selector: plug-in mapping of `anchorformer.selectors` (`_target_` and its fields).
        connector: plug-in mapping of `anchorformer.connectors`.
        tiling: fields of `anchorformer.tiling.Tiling`; empty where an image is one tile.
        integration: plug-in mapping of `anchorformer.integrations`; None where the language model sees of an image what
            stands at its placeholders.
        image_token_id: the placeholder that stands once per embedding of an image.
        image_mean, image_std: per channel in 0..1; what uint8 pixels are normalised with on the device.
    """

    model_type = "anchorformer"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 (transformers' own shape)

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        selector: dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        image_token_id: int | None = None,
        image_mean: tuple[float, float, float] = CLIP_MEAN,
        image_std: tuple[float, float, float] = CLIP_STD,
        tiling: dict[str, Any] | None = None,
        integration: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # transformers builds an empty configuration to find out which values differ from the defaults, so every
        # argument is optional here; the model itself refuses to be built from an incomplete one.
        self.vision_config = _as_config(vision_config, "clip_vision_model")
        self.text_config = _as_config(text_config, "llama")
        self.selector = dict(selector or {})
        self.connector = dict(connector or {})
        self.image_token_id = image_token_id
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.tiling = dict(tiling or {})
        self.integration = None if integration is None else dict(integration)
        kwargs.setdefault("tie_word_embeddings", bool(getattr(self.text_config, "tie_word_embeddings", False)))
        super().__init__(**kwargs)


def _as_config(value: PreTrainedConfig | dict[str, Any] | None, default_type: str) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    fields = dict(value or {})
    return AutoConfig.for_model(fields.pop("model_type", default_type), **fields)


AutoConfig.register(AnchorFormerConfig.model_type, AnchorFormerConfig)
