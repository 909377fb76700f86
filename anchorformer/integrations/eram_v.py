"""eRAM-V's efficient integration: middle layers look at all visual tokens through their own attention weights.

Text and anchors run through every layer as ever. At the input of each listed layer the anchors' embeddings get their
direct visual features added, and beside its self-attention text and anchors attend to all visual tokens, through the
same q, k, v and o. Both stand behind gates that start closed. No code was published; docs/methods.md says what is read
from the description and what is a reading of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedConfig

from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.errors import UserError
from anchorformer.integrations.base import ARGUMENT, Integration, IntegrationConfig, Placed, Rows
from anchorformer.kernels.attention import attend, rectangle_indices
from anchorformer.kernels.backend import Backend

FAMILIES = ("llama", "mistral", "qwen2")
"""Language models, by `model_type`, whose layers norm, project and add as is taken for granted here."""


@dataclass(frozen=True, kw_only=True)
class EramVConfig(IntegrationConfig):
    """Which layers look, and what their visual tokens are made by."""

    layers: tuple[Annotated[int, Field(ge=1)], ...]
    """The middle layers, ascending; 1 is the language model's first."""
    hidden_width: Annotated[int, Field(ge=1)] | None = None
    """Inner width of the MLP from the tower's width to the language model's; null: the language model's."""
    inject: bool = True
    """Whether the anchors' own visual features are added at the inputs of these layers."""

    def build(self, vision_width: int, text_config: PreTrainedConfig, num_anchors: int, num_embeddings: int) -> EramV:
        if text_config.model_type not in FAMILIES:
            raise UserError(
                "eRAM-V does not know the layers of this language model", found=f"model_type={text_config.model_type}",
                expected=f"one of {', '.join(FAMILIES)}",
                remedy="choose such a language model, or integration=none",
            )  # fmt: skip
        count = text_config.num_hidden_layers
        if not self.layers or list(self.layers) != sorted({*self.layers}) or self.layers[-1] > count:
            raise UserError(
                "model.integration.layers does not fit the language model", found=f"{list(self.layers)}",
                expected=f"at least one of 1 to {count}, ascending, each once",
                remedy=f"e.g. model.integration.layers=[{', '.join(map(str, middle_layers(count)))}]",
            )  # fmt: skip
        if self.inject and num_anchors != num_embeddings:
            raise UserError(
                "eRAM-V adds the features of each anchor to its own embedding, and this connector has others",
                found=f"{num_anchors} anchors, {num_embeddings} embeddings",
                expected="a connector with one embedding per anchor, such as anchor_former or mlp",
                remedy="set model.integration.inject=false, or choose such a connector",
            )  # fmt: skip
        width = text_config.hidden_size
        return EramV(self.layers, vision_width, self.hidden_width or width, width, inject=self.inject)


def middle_layers(count: int) -> list[int]:
    """From a quarter to five eighths of so many layers: 8 to 20 of 32."""
    return [*range(max(1, count // 4), max(1, count * 5 // 8) + 1)]


class EramV(Integration):
    """The MLP and the gates; hooks on the listed layers do the rest."""

    def __init__(
        self, layers: tuple[int, ...], vision_width: int, hidden_width: int, text_width: int, *, inject: bool
    ) -> None:
        super().__init__()
        self.layers, self.inject = layers, inject
        self.projector = nn.Sequential(
            nn.Linear(vision_width, hidden_width), nn.GELU(), nn.Linear(hidden_width, text_width)
        )  # fmt: skip
        self.cross_gate = Gate(len(layers))
        self.inject_gate = Gate(len(layers)) if inject else None

    def attach(self, language_model: nn.Module) -> None:
        decoder: Any = language_model.get_decoder()  # type: ignore[operator]
        for place, number in enumerate(self.layers):
            layer = decoder.layers[number - 1]
            hooks = _LayerHooks(place, layer)
            if self.inject:
                layer.register_forward_pre_hook(hooks.before_layer, with_kwargs=True)
            layer.self_attn.register_forward_hook(hooks.after_attention, with_kwargs=True)

    def forward(self, anchors: Anchors, features: VisionFeatures) -> Tensor:
        """The direct features of the anchors, where they are injected, and then all N visual tokens."""
        tokens = features.tokens_BNV
        if self.inject:
            tokens = torch.cat([anchors.tokens_BTV.to(tokens.dtype), tokens], dim=1)
        return cast(Tensor, self.projector(tokens.to(next(self.parameters()).dtype)))

    def split(self, said_XED: Tensor, num_embeddings: int) -> tuple[Tensor | None, Tensor]:
        own = num_embeddings if self.inject else 0
        return said_XED[:, :own] if self.inject else None, said_XED[:, own:]

    def argument(self, placed: Placed, rows: Rows, direct_BSD: Tensor | None) -> Context:
        inject_L = None if self.inject_gate is None else self.inject_gate()
        return Context(placed, rows, self.cross_gate(), inject_L, direct_BSD)


class Gate(nn.Module):
    """tanh of one number per layer, 0 at the start: a layer adds nothing until it has learnt something.

    A module of its own, because ZeRO-3 fetches a parameter where its module is called. Source: Flamingo, arXiv
    2204.14198, section 2.2.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.value_L = nn.Parameter(torch.zeros(count))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.value_L)

    def forward(self) -> Tensor:
        return self.value_L.tanh()


class Context:
    """What all layers of one forward share: the visual tokens, who sees them, and how far the gates are open.

    A position sees the views of its own row that begin at or before it, so that nothing depends on what comes later.

    Args:
        cross_L, inject_L: of the gates.
    """

    def __init__(
        self, placed: Placed, rows: Rows, cross_L: Tensor, inject_L: Tensor | None, direct_BSD: Tensor | None
    ) -> None:
        self._placed = placed
        self._cross_L, self._inject_L, self._direct_BSD = cross_L, inject_L, direct_BSD
        self._layout = _Layout.of(placed, rows)

    def injected(self, place: int, hidden_BSD: Tensor) -> Tensor:
        """A layer's input with the direct features added to it."""
        if self._direct_BSD is None or self._inject_L is None:
            return hidden_BSD
        return hidden_BSD + (self._inject_L[place] * self._direct_BSD).to(hidden_BSD.dtype)

    def looked(self, place: int, layer: Any, normed_BSD: Tensor) -> Tensor:
        """What a layer's self-attention adds, for its normed input, if its keys and values are the visual tokens.

        Queries and keys are not rotated. 0 at positions that see none.
        """
        attention, layout = layer.self_attn, self._layout
        key_RhTK, value_RhTK = self._keys_and_values(place, layer, normed_BSD.dtype)
        query_BSHK = attention.q_proj(normed_BSD).unflatten(-1, (-1, attention.head_dim))
        # Never with a matrix of scores, at no size: those of every layer would be kept until backward.
        out_RLHK = attend(
            layout.to_rows(query_BSHK).transpose(1, 2), key_RhTK, value_RhTK, scale=attention.scaling,
            mask=layout.mask, dropout=attention.attention_dropout if attention.training else 0.0, backend=Backend.sdpa,
        )  # fmt: skip
        out_BSD: Tensor = attention.o_proj(layout.from_rows(out_RLHK).flatten(2))
        return out_BSD * (self._cross_L[place] * layout.sees_BS1).to(out_BSD.dtype)

    def _keys_and_values(self, place: int, layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        kept = self._placed.kept
        if kept is not None and place in kept:
            return kept[place]
        attention = layer.self_attn
        normed_XND = layer.input_layernorm(self._placed.said_XED.to(dtype))
        rows, most = self._placed.view_RW.shape
        view_V = self._placed.view_RW.clamp(min=0).flatten()

        def of_rows(x_XNE: Tensor) -> Tensor:
            x_RTE = x_XNE.index_select(0, view_V).unflatten(0, (rows, most)).flatten(1, 2)
            return x_RTE.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        made = of_rows(attention.k_proj(normed_XND)), of_rows(attention.v_proj(normed_XND))
        if kept is not None:
            kept[place] = made
        return made


class _Layout:
    """Positions as rows, each beside the visual tokens of its own views.

    Attributes:
        sees_BS1: 1 where a position sees any view, else 0.
        mask: bool (R, 1, L, W N), which visual tokens each sees; None where a row has one view, since what does not see
            that one is multiplied by 0.
    """

    def __init__(self, sees_BSW: Tensor, tokens: int, rows: Rows) -> None:
        self._to_rows = self._from_rows = None
        if rows.cu_seqlens is not None and rows.max_seqlen is not None:
            samples, positions = rows.cu_seqlens.numel() - 1, sees_BSW.shape[1]
            self._shape = samples, rows.max_seqlen
            self._to_rows, self._from_rows = rectangle_indices(rows.cu_seqlens.long(), rows.max_seqlen, positions)
        any_BS1 = sees_BSW.any(-1, keepdim=True)
        self.sees_BS1 = any_BS1.float()
        self.mask = None
        if sees_BSW.shape[2] > 1:
            # A softmax over nothing would be NaN, in backward too; what sees nothing sees all, and is multiplied by 0.
            sees_RLW = self.to_rows(sees_BSW | ~any_BS1)
            self.mask = sees_RLW.repeat_interleave(tokens, 2)[:, None]

    @classmethod
    def of(cls, placed: Placed, rows: Rows) -> _Layout:
        here_S = torch.arange(rows.positions, device=placed.view_RW.device)
        if rows.cu_seqlens is None:
            here_S1 = (rows.before + here_S)[:, None]
            sees_BSW = (placed.view_RW >= 0)[:, None] & (placed.start_RW[:, None] <= here_S1)
        else:
            borders = rows.cu_seqlens.long()
            sample_S = torch.searchsorted(borders[1:], here_S, right=True)
            here_S1 = (here_S - borders[sample_S])[:, None]
            sees_BSW = ((placed.view_RW[sample_S] >= 0) & (placed.start_RW[sample_S] <= here_S1))[None]
        return cls(sees_BSW, placed.said_XED.shape[1], rows)

    def to_rows(self, x_BSF: Tensor) -> Tensor:
        if self._to_rows is None:
            return x_BSF
        return x_BSF[0].index_select(0, self._to_rows).unflatten(0, self._shape)

    def from_rows(self, x_RLF: Tensor) -> Tensor:
        return x_RLF if self._from_rows is None else x_RLF.flatten(0, 1).index_select(0, self._from_rows)[None]


@dataclass(frozen=True, eq=False)
class _LayerHooks:
    """Of one layer; they hold no state, and no module of the integration."""

    place: int
    layer: Any

    def before_layer(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        context = kwargs.get(ARGUMENT)
        return None if context is None else ((context.injected(self.place, args[0]), *args[1:]), kwargs)

    def after_attention(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        context = kwargs.get(ARGUMENT)
        if context is None:
            return None
        own_BSD, *rest = output
        return own_BSD + context.looked(self.place, self.layer, kwargs["hidden_states"]), *rest
