"""Vision tower to loss against the published code: embeddings, labels, logits, loss, gradients, greedy ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.contracts import IGNORE_INDEX
from anchorformer.convert import to_published
from anchorformer.fusion import fuse
from anchorformer.modeling import AnchorFormerForConditionalGeneration

# The tolerances that come with the vectors, relative to the largest absolute value of the reference tensor.
FORWARD, GRADIENT, VISION = 1e-4, 5e-4, 5e-5


@dataclass
class Row:
    """One sample of a case with its placeholders expanded, and what the published code made of it."""

    ids: Tensor
    labels: Tensor
    pixels: Tensor
    embeds: Tensor
    logits: Tensor
    greedy: Tensor | None
    is_cut: bool


@pytest.fixture(scope="module")
def settings(golden_root: Path) -> dict[str, Any]:
    return json.loads((golden_root / "e2e" / "config.json").read_text())


@pytest.fixture(scope="module")
def model(golden_root: Path, settings: dict[str, Any]) -> AnchorFormerForConditionalGeneration:
    from anchorformer.convert import from_published

    connector = settings["connector"]
    config = AnchorFormerConfig(
        vision_config=CLIPVisionConfig(**settings["clip"], **settings["clip_extra"]),
        text_config=LlamaConfig(**settings["llama"]),
        selector={
            "_target_": "anchorformer.selectors.anchor.AnchorSelectorConfig",
            "num_anchors": settings["T"],
            "layer": settings["select_layer"],
        },
        connector={
            "_target_": "anchorformer.connectors.anchor_former.AnchorFormerConnectorConfig",
            "depth": connector["depth"],
            "num_heads": connector["heads"],
            "head_dim": connector["dim_head"],
            "ff_mult": connector["ff_mult"],
        },
        image_token_id=_unused_id(golden_root, settings),
    )
    model = AnchorFormerForConditionalGeneration(config).eval()
    folder = golden_root / "e2e"
    published = load_file(folder / "clip.safetensors")
    vision = {name: published[f"vision_model.{name}"] for name in model.vision_tower.model.state_dict()}
    model.vision_tower.model.load_state_dict(vision)
    model.language_model.load_state_dict(load_file(folder / "llama.safetensors"))
    projector = from_published(load_file(folder / "projector.safetensors"), model.connector.state_dict())
    model.connector.load_state_dict(projector)
    return model


def _unused_id(golden_root: Path, settings: dict[str, Any]) -> int:
    """An id that no case has as text, to stand for the published marker, which is negative."""
    used = {int(i) for path in (golden_root / "e2e").glob("case_*") for i in load_file(path)["input_ids"].unique()}
    return min(set(range(settings["llama"]["vocab_size"])) - used)


@pytest.fixture(scope="module")
def cases(golden_root: Path, model: AnchorFormerForConditionalGeneration, settings: dict[str, Any]) -> dict[str, Any]:
    listed = json.loads((golden_root / "e2e" / "cases.json").read_text())
    return {
        name: (facts, load_file(golden_root / "e2e" / f"case_{name}.safetensors")) for name, facts in listed.items()
    }


def rows_of(
    model: AnchorFormerForConditionalGeneration, settings: dict[str, Any], tensors: dict[str, Tensor]
) -> list[Row]:
    """Undoes the published batch: strips padding, expands markers, hands each row its images.

    Deviation by rule: a row without a marker still uses up one image there; here it has none.
    """
    count, marker = settings["T"], settings["image_token"]
    given = tensors.get("attention_mask", torch.ones_like(tensors["input_ids"])).bool()
    kept = tensors.get("out.attention_mask", torch.ones(tensors["out.inputs_embeds"].shape[:2])).bool()
    labels = tensors.get("labels", torch.full_like(tensors["input_ids"], IGNORE_INDEX))
    texts = [ids[mask] for ids, mask in zip(tensors["input_ids"], given, strict=True)]
    slots = sum(max(1, int((ids == marker).sum())) for ids in texts)
    rows, used = [], 0
    for index, ids in enumerate(texts):
        markers = int((ids == marker).sum())
        tiles = 1
        if slots != len(tensors["pixels"]):  # several tiles an image: the reference's length tells how many
            tiles = (int(kept[index].sum()) - len(ids) + markers) // (markers * count)
        is_image = ids == marker
        repeats = torch.where(is_image, tiles * count, 1)
        expanded = torch.where(is_image, model.config.image_token_id, ids).repeat_interleave(repeats)
        row_labels = torch.where(is_image, IGNORE_INDEX, labels[index][given[index]]).repeat_interleave(repeats)
        greedy = tensors["out.greedy_ids"][index] if "out.greedy_ids" in tensors else None
        rows.append(
            Row(
                expanded, row_labels, tensors["pixels"][used : used + markers * tiles],
                tensors["out.inputs_embeds"][index][kept[index]], tensors["out.logits"][index][kept[index]],
                greedy, int(kept[index].sum()) < len(expanded),
            )
        )  # fmt: skip
        used += max(1, markers) * tiles
    return rows


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def flat_logits(model: AnchorFormerForConditionalGeneration, rows: list[Row]) -> list[Tensor]:
    lengths = [len(row.ids) for row in rows]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    logits = model(
        input_ids=torch.cat([row.ids for row in rows])[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        pixel_values=torch.cat([row.pixels for row in rows]),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
    ).logits[0]
    return list(logits.split(lengths))


def test_vision_selection_and_projector(golden_root: Path, model: AnchorFormerForConditionalGeneration) -> None:
    reference = load_file(golden_root / "e2e" / "vision.safetensors")
    features = model.vision_tower(reference["pixels"])
    anchors = model.selector(features)
    assert features.cls_scores_BHN is not None
    assert_close(features.tokens_BNV, reference["features"], VISION, "features")
    assert_close(features.cls_scores_BHN.softmax(-1), reference["cls_attention"], VISION, "[CLS] attention")
    assert torch.equal(anchors.indices_BT, reference["anchor_indices"])
    assert_close(anchors.tokens_BTV, reference["anchors"], VISION, "anchors")
    assert_close(model.connector(anchors, features), reference["image_embeds"], VISION, "image embeddings")


def test_embeddings_labels_logits(model: AnchorFormerForConditionalGeneration, cases, settings) -> None:
    for name, (_, tensors) in cases.items():
        rows = rows_of(model, settings, tensors)
        with torch.no_grad():
            packed = flat_logits(model, rows)
        for row, logits in zip(rows, packed, strict=True):
            length = len(row.embeds)  # over-length rows were cut there; a causal model agrees up to the cut
            text = model.get_input_embeddings()(row.ids[None])
            seen = text.new_zeros(0, 1, text.shape[-1]) if not len(row.pixels) else model.encode_images(row.pixels)
            embeds = fuse(text, row.ids[None], seen, model.image_token_id)[0]
            assert_close(embeds[:length], row.embeds, FORWARD, f"{name}: embeddings")
            assert_close(logits[:length], row.logits, FORWARD, f"{name}: logits")


def test_loss_and_projector_gradients(model: AnchorFormerForConditionalGeneration, cases, settings) -> None:
    compared = 0
    for name, (facts, tensors) in cases.items():
        rows = rows_of(model, settings, tensors)
        if "loss" not in facts or any(row.is_cut for row in rows):
            continue  # without labels there is no loss; the published code cuts what ours refuses
        kept = tensors["out.attention_mask"].bool()
        for row, reference, mask in zip(rows, tensors["out.labels"], kept, strict=True):
            assert torch.equal(row.labels, reference[mask]), name
        model.zero_grad()
        pairs = [(x[:-1], row.labels[1:]) for x, row in zip(flat_logits(model, rows), rows, strict=True)]
        logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
        assert int((labels != IGNORE_INDEX).sum()) == facts["supervised_tokens_after_shift"]
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
        assert abs(loss.item() - facts["loss"]) <= FORWARD
        loss.backward()
        gradients = to_published({n: p.grad for n, p in model.connector.named_parameters() if p.grad is not None})
        del gradients["0.latents"]  # what the anchor path never reads has no gradient, here or there
        prefix = "out.grad_projector."
        assert {prefix + key for key in gradients} == {key for key in tensors if key.startswith(prefix)}
        for key, gradient in gradients.items():
            assert_close(gradient, tensors[prefix + key], GRADIENT, f"{name}: gradient of {key}")
        compared += 1
    assert compared


def test_greedy_ids(model: AnchorFormerForConditionalGeneration, cases, settings) -> None:
    compared = 0
    for name, (_, tensors) in cases.items():
        for row in rows_of(model, settings, tensors):
            if row.greedy is None:
                continue
            expected = row.greedy[1:]  # the reference starts its answer with a begin-of-text of its own
            found = model.generate(
                input_ids=row.ids[None], attention_mask=torch.ones(1, len(row.ids), dtype=torch.long),
                pixel_values=row.pixels, max_new_tokens=len(expected), do_sample=False,
            )  # fmt: skip
            assert torch.equal(found[0, len(row.ids) :], expected), name
            compared += 1
    assert compared
