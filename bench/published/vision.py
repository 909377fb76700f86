"""The published vision path: every block runs eagerly, every attention map is kept, one row of one map is read."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

TAPPED = -2
"""Hidden state and attention map that are read: both belong to the last block but one."""


class PublishedTower:
    """A whole CLIP-shaped tower asked for all hidden states and all attention maps.

    The N x N maps of all blocks live until the forward returns; the last block is computed and not used. Source: the
    `CLIPVisionTower` of AnchorFormer's release (after LLaVA's), as described in its paper, arXiv 2405.18405.

    Args:
        hf_model: a tower of transformers with all of its blocks; switched to eager attention for good.
    """

    def __init__(self, hf_model: PreTrainedModel) -> None:
        hf_model.set_attn_implementation("eager")
        self.model = hf_model.eval()

    @torch.no_grad()
    def __call__(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the tapped block (B, N, V) and its [CLS] probabilities (B, H, N), as cast by the tower."""
        pixels = pixels_B3HW.to(next(self.model.parameters()).dtype)
        out = self.model(pixels, output_hidden_states=True, output_attentions=True)
        return out.hidden_states[TAPPED], out.attentions[TAPPED][:, :, 0]


class PublishedBlock:
    """One block with its attention map, for sizes at which a whole tower is more than a CPU should be asked for.

    Args:
        block: a CLIP-shaped block whose config says eager attention.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block.eval()
        self._map: Tensor | None = None
        (attention,) = (module for module in block.modules() if hasattr(module, "is_causal"))
        attention.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: object, output: tuple[Tensor, Tensor]) -> None:
        self._map = output[1]

    @torch.no_grad()
    def __call__(self, tokens_BNV: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output (B, N, V) and the [CLS] row (B, H, N) of its map, which is freed only now."""
        out = self.block(tokens_BNV, attention_mask=None)
        weights, self._map = self._map, None
        if weights is None:
            raise RuntimeError("the block kept no attention map: its config does not say eager attention")
        return out, weights[:, :, 0].clone()
