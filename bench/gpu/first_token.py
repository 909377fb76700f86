"""Time to first token at batch 1: from pixels and ids on the host to the chosen id back on it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anchorformer.modeling import AnchorFormerForConditionalGeneration
from bench.gpu.session import Columns, Session
from bench.gpu.shapes import Length, make_examples
from bench.gpu.timing import graphed, synchronize

PROMPT = 60
"""Text positions of the question, its template included; the image comes on top."""
REPEATS = 20


def first_token(session: Session, model: AnchorFormerForConditionalGeneration) -> None:
    """Rows for `generate`, one plain forward with a cache, and the same replayed from a CUDA graph."""
    device = session.scale.device
    model.eval()
    (example,) = make_examples(model, [Length(text=PROMPT, supervised=1)])
    ids, pixels = example.input_ids_S[None], example.tiles_B3HW
    if device.type == "cuda":
        ids, pixels = ids.pin_memory(), pixels.pin_memory()

    def generate() -> int:
        out = model.generate(
            input_ids=ids.to(device, non_blocking=True), pixel_values=pixels.to(device, non_blocking=True),
            attention_mask=torch.ones_like(ids, device=device), max_new_tokens=1, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        return int(out[0, -1])

    def forward() -> int:
        with torch.no_grad():
            out = model(
                ids.to(device, non_blocking=True), pixel_values=pixels.to(device, non_blocking=True), use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            return int(out.logits[0, -1].argmax())

    expected = forward()
    makers: dict[str, Callable[[], Callable[[], int]]] = {"generate": lambda: generate, "forward": lambda: forward}
    if device.type == "cuda":
        makers["forward, CUDA graph"] = lambda: _replayed(model, ids, pixels)
    for variant, make in makers.items():
        labels = {"what": "first token", "variant": variant, "batch": 1, "positions": ids.shape[1]}

        def row(make: Callable[[], Callable[[], int]] = make) -> Columns:
            run = make()
            chosen = {run() for _ in range(3)}
            synchronize(device)
            seconds = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - started)
            return {
                "ms": 1e3 * statistics.median(seconds), "low_ms": 1e3 * min(seconds), "high_ms": 1e3 * max(seconds),
                "equal": chosen == {expected},
            }  # fmt: skip

        session.row(labels, 5, row)


def _replayed(model: Any, ids: Tensor, pixels: Tensor) -> Callable[[], int]:
    """Everything between the copies to and from the device as one graph.

    `forward` compares the number of placeholders with the number of embeddings on the host, which a graph cannot; here
    their places are known before.
    """
    still_ids, still_pixels = ids.cuda(), pixels.cuda()
    places = (ids[0] == model.image_token_id).nonzero().squeeze(1).cuda()
    token = torch.zeros((), dtype=torch.int64, device="cuda")

    @torch.no_grad()
    def prefill() -> None:
        embeds = model.get_input_embeddings()(still_ids)
        visual = model.encode_images(still_pixels).flatten(0, 1).to(embeds.dtype)
        embeds = embeds.index_copy(1, places, visual[None])
        out = model.language_model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        token.copy_(out.logits[0, -1].argmax())

    replay = graphed(prefill, ())

    def run() -> int:
        still_ids.copy_(ids, non_blocking=True)
        still_pixels.copy_(pixels, non_blocking=True)
        replay()
        return int(token)

    return run
