"""`bench gpu-micro`: single operations on one card, each beside the published way, and the card's ceilings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionConfig

from anchorformer.contracts import Anchors, VisionFeatures, VisionNeeds
from anchorformer.errors import run_guarded
from anchorformer.kernels import vision_attention_triton
from anchorformer.kernels.attention import attend_flat
from anchorformer.kernels.cls_row import cls_row
from anchorformer.kernels.vision_attention import attend_with_cls_row
from anchorformer.modeling import parse_parts
from anchorformer.vision import VisionTower
from bench.gpu.selection import selection
from bench.gpu.session import Columns, Session, parser
from bench.gpu.shapes import LONGEST, made_in, parts_of, read_lengths
from bench.gpu.timing import measure
from bench.published.connector import PublishedConnector
from bench.published.vision import PublishedTower

BATCHES = (4, 32)
"""Images that the connector is given."""
TEXT_SAMPLES = 16


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("gpu-micro", __doc__)
    options.add_argument("--only", help=f"comma-separated, of {','.join(SECTIONS)}")
    parsed = options.parse_args(arguments)
    session = Session("gpu-micro", parsed)
    session.measure_ceilings()
    for name in parsed.only.split(",") if parsed.only else SECTIONS:
        SECTIONS[name](session)
    session.close()


def _batches(session: Session) -> list[tuple[int, int, int]]:
    """(image side, visual tokens, batch): 336 x 32, 672 x 4 and 1008 x 1 at the published size."""
    patch = session.scale.vision["patch_size"]
    return [
        (side, (side // patch) ** 2 + 1, batch) for side, batch in zip(session.scale.sides, (32, 4, 1), strict=False)
    ]


def vision(session: Session) -> None:
    """The whole tower: as published, as transformers runs it with SDPA, ours, and ours compiled."""
    scale = session.scale
    for side, tokens, batch in _batches(session):
        config = CLIPVisionConfig(**{**scale.vision, "image_size": side})
        with made_in(scale):
            whole = AutoModel.from_config(config, attn_implementation="sdpa", dtype=scale.dtype).eval()
            pixels = [(torch.randn(batch, 3, side, side),) for _ in range(2)]
        tower = VisionTower(copy.deepcopy(whole), VisionNeeds(layer=-2, cls_scores=True)).requires_grad_(False)
        published = PublishedTower(copy.deepcopy(whole))
        reference = published(*pixels[0])[0]

        def sdpa(x: Tensor, model: nn.Module = whole) -> Tensor:
            with torch.no_grad():
                return model(x, output_hidden_states=True).hidden_states[-2]

        compiled = torch.compile(tower, fullgraph=True, backend=session.compiler)
        variants: dict[str, Callable[..., Any]] = {
            "published": lambda x, run=published: run(x)[0], "sdpa, all blocks": sdpa,
            "ours": lambda x, run=tower: run(x).tokens_BNV,
            "ours, compiled": lambda x, run=compiled: run(x).tokens_BNV,
        }  # fmt: skip
        for variant, run in variants.items():
            labels = {"what": "vision tower", "variant": variant, "side": side, "tokens": tokens, "batch": batch}

            def row(run: Callable[..., Any] = run, pixels: Any = pixels, reference: Tensor = reference) -> Columns:
                error = _error(run(*pixels[0]), reference)
                timing = measure(run, pixels, scale.device, seconds=0.5)
                return {**timing.columns(), "ms_per_image": timing.ms / len(pixels[0][0]), "error": error}

            session.row(labels, 60 if variant == "ours, compiled" else 5, row)
        torch.compiler.reset()


def tapped_attention(session: Session) -> None:
    """Attention of the tapped block with its [CLS] row: eager, SDPA and the row kernel, both in one pass."""
    heads = session.scale.vision["num_attention_heads"]
    width = session.scale.vision["hidden_size"] // heads
    scaling = width**-0.5

    def eager(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        weights = (query @ key.transpose(2, 3) * scaling).softmax(-1, dtype=torch.float32).to(query.dtype)
        return (weights @ value).transpose(1, 2).contiguous(), weights[:, :, 0]

    def two_kernels(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out = F.scaled_dot_product_attention(query, key, value, scale=scaling)
        return out.transpose(1, 2).contiguous(), cls_row(query, key, scaling)

    def one_pass(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        # The kernel itself, whatever the library chooses at this size: this is what its choice is made from.
        run = attend_with_cls_row if session.tiny else vision_attention_triton.launch
        return run(query, key, value, scaling)

    def sdpa_alone(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2).contiguous(), None

    variants = {"eager": eager, "sdpa alone": sdpa_alone, "sdpa + row": two_kernels, "one pass": one_pass}
    for _, tokens, batch in _batches(session):
        with made_in(session.scale):
            inputs = [[torch.randn(batch, tokens, heads, width).transpose(1, 2) for _ in range(3)] for _ in range(2)]
        exact_out, _ = eager(*(x.float() for x in inputs[0]))
        exact_row = (inputs[0][0][:, :, :1].float() * inputs[0][1].float()).sum(-1) * scaling
        for variant, run in variants.items():

            def row(run: Callable[..., Any] = run, inputs: Any = inputs, out: Tensor = exact_out,
                    scores: Tensor = exact_row) -> Columns:  # fmt: skip
                got, got_row = run(*inputs[0])
                columns = {"error": _error(got, out)}
                if run in (two_kernels, one_pass):
                    columns["row_error"] = _error(got_row, scores)
                return {**measure(run, inputs, session.scale.device).columns(), **columns}

            session.row({"what": "tapped attention", "variant": variant, "tokens": tokens, "batch": batch}, 3, row)


def connector(session: Session) -> None:
    """Forward and backward of the AnchorFormer connector: einsum, ours, with one folded KV product, compiled."""
    scale = session.scale
    width = scale.vision["hidden_size"]
    _, plain = parts_of("anchor_former", scale)
    for (_, tokens, _), batch in ((size, batch) for size in _batches(session) for batch in BATCHES):
        with made_in(scale):
            ours, folded = (
                parse_parts(parts_of("anchor_former", scale)[0], plain | {"fold_kv": fold})[1].build(
                    width, scale.text["hidden_size"]
                )
                for fold in (False, True)
            )
            folded.load_state_dict(ours.state_dict())
            media = [torch.randn(batch, tokens, width) for _ in range(2)]
            queries = [x[:, : scale.num_anchors].contiguous() for x in media]
            weights = torch.randn(batch, scale.num_anchors, scale.text["hidden_size"])
        inputs = list(zip(queries, media, strict=True))
        reference = _connect(ours, *inputs[0])

        variants = {
            "einsum": PublishedConnector(ours), "ours": ours, "ours, folded": folded,
            "ours, compiled": torch.compile(ours, fullgraph=True, backend=session.compiler),
            "folded, compiled": torch.compile(folded, fullgraph=True, backend=session.compiler),
        }  # fmt: skip
        for variant, module in variants.items():

            def train(anchors: Tensor, tokens: Tensor, module: nn.Module = module, weights: Tensor = weights) -> None:
                module.zero_grad(set_to_none=True)
                _connect(module, anchors, tokens).backward(weights)

            def row(module: nn.Module = module, train: Callable[..., None] = train, inputs: Any = inputs,
                    reference: Tensor = reference) -> Columns:  # fmt: skip
                with torch.no_grad():
                    error = _error(_connect(module, *inputs[0]), reference)
                columns = measure(train, inputs, scale.device, seconds=0.3).columns()
                module.zero_grad(set_to_none=True)
                return {**columns, "error": error}

            labels = {"what": "connector", "variant": variant, "tokens": tokens, "batch": batch}
            session.row(labels, 25 if "compiled" in variant else 3, row)
        torch.compiler.reset()


def _connect(module: nn.Module, anchors: Tensor, tokens: Tensor) -> Tensor:
    out: Tensor = module(
        Anchors(tokens_BTV=anchors, indices_BT=None),
        VisionFeatures(tokens_BNV=tokens, cls_scores_BHN=None, has_cls=True),
    )
    return out


def text_attention(session: Session) -> None:
    """Causal attention of one language model layer over one rank's samples, forward and backward."""
    scale = session.scale
    heads = scale.text["num_attention_heads"]
    width = scale.text["hidden_size"] // heads
    for name, found in read_lengths(session.lengths, tiny=session.tiny)[2].items():
        lengths = [min(length.positions(scale.num_anchors), LONGEST) for length in found[:TEXT_SAMPLES]]
        borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(scale.device)
        longest, total = max(lengths), sum(lengths)
        with made_in(scale):
            flat = [_leaves(1, total, heads, width) for _ in range(2)]
            rows = [_leaves(len(lengths), longest, heads, width) for _ in range(2)]
        sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(scale.device)
        where = torch.arange(total, device=scale.device)
        mask = (sample[:, None] == sample) & (where[:, None] >= where)
        place = sample * longest + where - borders[sample].long()
        shape = (len(lengths), longest)

        def packed(q: Tensor, k: Tensor, v: Tensor, borders: Tensor = borders, longest: int = longest) -> Tensor:
            return attend_flat(q, k, v, scale=width**-0.5, cu_seqlens=borders, max_seqlen=longest)

        def rectangle(q: Tensor, k: Tensor, v: Tensor, place: Tensor = place, shape: tuple[int, int] = shape) -> Tensor:
            def spread(x_1HSK: Tensor) -> Tensor:
                empty = x_1HSK.new_zeros(shape[0] * shape[1], heads, width)
                return empty.index_copy(0, place, x_1HSK[0].transpose(0, 1)).unflatten(0, shape).transpose(1, 2)

            out = F.scaled_dot_product_attention(spread(q), spread(k), spread(v), is_causal=True)
            return out.transpose(1, 2).flatten(0, 1).index_select(0, place).unsqueeze(0)

        def dense_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

        def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        reference = dense_mask(*(x.float() for x in flat[0]))
        variants = {"packed": packed, "rectangle": rectangle, "dense mask": dense_mask, "padded": padded}
        for variant, run in variants.items():
            inputs = rows if variant == "padded" else flat

            def train(*qkv: Tensor, run: Callable[..., Tensor] = run) -> None:
                out = run(*qkv)
                torch.autograd.grad(out, qkv, grad_outputs=out.detach())

            def row(variant: str = variant, run: Callable[..., Tensor] = run, train: Callable[..., None] = train,
                    inputs: Any = inputs, reference: Tensor = reference) -> Columns:  # fmt: skip
                error = None if variant == "padded" else _error(run(*inputs[0]), reference)
                return {**measure(train, inputs, scale.device).columns(), "error": error}

            labels = {
                "what": "text attention", "variant": variant, "lengths": name, "samples": len(lengths),
                "positions": total, "longest": longest,
            }  # fmt: skip
            session.row(labels, 3, row)


def _leaves(batch: int, positions: int, heads: int, width: int) -> list[Tensor]:
    """Query, key and value (batch, H, positions, K), laid out as a projection leaves them."""
    return [torch.randn(batch, positions, heads, width).transpose(1, 2).requires_grad_() for _ in range(3)]


def _error(got: Tensor, reference: Tensor) -> float:
    """|got - reference| / |reference| over the whole tensor."""
    got, reference = got.detach().float(), reference.detach().float()
    return float(torch.linalg.vector_norm(got - reference) / torch.linalg.vector_norm(reference))


SECTIONS: dict[str, Callable[[Session], None]] = {
    "selection": selection, "tapped_attention": tapped_attention, "text_attention": text_attention,
    "vision": vision, "connector": connector,
}  # fmt: skip
"""What can be measured, in order: what needs no compiler comes first."""

if __name__ == "__main__":
    run_guarded(main)
