"""LLaVA folders: the imported model is transformers' own, pruned or not, and what is none is refused by name."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from anchorformer.devices import Device
from anchorformer.errors import UserError
from anchorformer.import_llava import import_llava, main, read_selector
from anchorformer.model_folder import write_manifest
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.weights import check_folder, load_model
from data.record import ImageRef
from evals.config import EvalConfig, EvalDataConfig
from evals.questions import Question
from evals.respondent import load

PATCHES = 16
IMAGE_TOKEN = "<image>"


@pytest.fixture(scope="module")
def llava(tiny_backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA-1.5 with random weights as transformers saves it; tests must not write into it."""
    from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("llava") / "published"
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbones / "llama")
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    torch.manual_seed(3)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28,
                patch_size=7,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer) + 6, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        )
    )  # fmt: skip
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5, 0.4, 0.3],
                    "image_std": [0.2, 0.3, 0.4], "crop_size": {"height": 28, "width": 28}})
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def published(llava: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).eval()


def _imported(folder: Path) -> tuple[Any, AnchorFormerProcessor]:
    check_folder(folder, every_hash=True)
    return load_model(folder, torch.float32).eval(), AnchorFormerProcessor.from_pretrained(folder)


PICTURE = Image.radial_gradient("L").resize((28, 28)).convert("RGB")


def _asked(processor: AnchorFormerProcessor, token_counts: list[list[int]] | None = None) -> tuple[Tensor, Tensor]:
    turns = [("user", f"{IMAGE_TOKEN}\nwhat color is the star?")]
    inputs = processor(PICTURE, conversations=[turns], token_counts=token_counts)
    return inputs["input_ids"], inputs["pixel_values"]


def _pixels(tiles: Tensor) -> Tensor:
    shape = (1, 3, 1, 1)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(shape), torch.tensor([0.2, 0.3, 0.4]).view(shape)
    return (tiles.float() / 255 - mean) / std


@torch.no_grad()
def test_all_patches_are_llava_itself(llava: Path, published: Any, tmp_path: Path) -> None:
    main([str(llava), str(tmp_path / "out"), "selector=all"])
    model, processor = _imported(tmp_path / "out")
    assert processor.num_image_tokens == PATCHES
    ids, tiles = _asked(processor)
    mask = torch.ones_like(ids)
    ours = model(ids, attention_mask=mask, pixel_values=tiles).logits
    theirs = published(input_ids=ids, attention_mask=mask, pixel_values=_pixels(tiles)).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    options = {"do_sample": False, "max_new_tokens": 8, "suppress_tokens": [model.image_token_id]}
    said = model.generate(input_ids=ids, attention_mask=mask, pixel_values=tiles, **options)
    expected = published.generate(input_ids=ids, attention_mask=mask, pixel_values=_pixels(tiles), **options)
    assert torch.equal(said, expected)


INDEX_SELECTORS = {
    "anchor": {"num_anchors": 9}, "average": {"num_anchors": 6}, "fastervlm": {"num_anchors": 5},
    "vtc_cls": {"num_anchors": 5}, "received": {"num_anchors": 5}, "cls_similarity": {"num_anchors": 5},
    "pca": {"num_anchors": 5}, "uniform": {"num_anchors": 4}, "random": {"num_anchors": 5},
    "correlation": {"low_layer": 1, "deep_layer": -1, "tau": 0.9, "min_neighbours": 2},
}  # fmt: skip
MERGING_SELECTORS = {
    "visionzip": {"num_anchors": 6}, "prumerge_plus": {"num_anchors": 9, "neighbours": 4}, "mean_pool": {},
}  # fmt: skip
SELECTORS: dict[str, dict[str, Any]] = INDEX_SELECTORS | MERGING_SELECTORS


@pytest.mark.parametrize("name", SELECTORS)
@torch.no_grad()
def test_pruned_is_llava_fed_with_the_pruned_embeddings(name: str, llava: Path, published: Any, tmp_path: Path) -> None:
    selector = read_selector([f"selector={name}", *(f"selector.{k}={v}" for k, v in SELECTORS[name].items())])
    model, processor = _imported(import_llava(llava, selector, tmp_path / "out"))
    pixels = _pixels(processor.image_transform.tiles([PICTURE]))
    features = model.vision_tower(pixels)
    hidden = published.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    anchors = model.selector(replace(features, tokens_BNV=hidden))
    assert (anchors.indices_BT is None) == (name in MERGING_SELECTORS)
    kept = anchors.tokens_BTV if anchors.indices_BT is None else hidden.take_along_dim(anchors.indices_BT[..., None], 1)
    assert kept.shape[1] < PATCHES
    ids, tiles = _asked(processor, [[kept.shape[1]]])
    embeds = published.get_input_embeddings()(ids)
    embeds[ids == model.image_token_id] = published.model.multi_modal_projector(kept)[0]
    mask = torch.ones_like(ids)
    theirs = published(inputs_embeds=embeds, attention_mask=mask).logits
    ours = model(ids, attention_mask=mask, pixel_values=tiles).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_it_is_evaluated_as_any_model(llava: Path, tmp_path: Path) -> None:
    folder = import_llava(llava, read_selector(["selector=fastervlm", "selector.num_anchors=5"]), tmp_path / "out")
    config = EvalConfig(model=str(folder), tasks={"t": {}}, data=EvalDataConfig(root="r"), device=Device.cpu)
    stream = io.BytesIO()
    Image.effect_noise((40, 30), 80).save(stream, "PNG")
    question = Question("q", (("user", f"{IMAGE_TOKEN}\nwhat?"),), (ImageRef(data=stream.getvalue()),), ("red",), {})
    respondent = load(folder, config)
    assert len(respondent.answers([question], 4)) == 1
    assert respondent.facts["template"] == "v1"


def _rename(folder: Path, out: Path, change: Callable[[str], str], more: Iterable[str] = ()) -> Path:
    """The folder in one shard, its tensors under other names, with more tensors in it."""
    shutil.copytree(folder, out)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(out.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (out / "model.safetensors.index.json").unlink()
    save_file({change(k): v for k, v in tensors.items()} | {k: torch.zeros(1) for k in more}, out / "model.safetensors")
    return out


def _as_transformers_4(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def _as_transformers_5(name: str) -> str:
    return f"model.{name}".replace("model.language_model.lm_head", "lm_head").replace("language_model.model.", "language_model.")  # noqa: E501  # fmt: skip


@pytest.mark.parametrize("change", [_as_transformers_4, _as_transformers_5])
def test_every_layout_gives_the_same_weights(change: Callable[[str], str], llava: Path, tmp_path: Path) -> None:
    selector = read_selector(["selector=all"])
    buffers = ["vision_tower.vision_model.embeddings.position_ids"]
    renamed = _rename(llava, tmp_path / "renamed", change, buffers)
    one = import_llava(llava, selector, tmp_path / "one")
    other = import_llava(renamed, selector, tmp_path / "other")
    for part in ("vision_tower", "connector", "language_model"):
        file = f"{part}.safetensors"
        assert (one / file).read_bytes() == (other / file).read_bytes()


OTHERS = {
    "LLaVA-NeXT": ({"model_type": "llava_next"}, "llava_next"),
    "the original repository's layout": ({"mm_vision_tower": "openai/clip"}, "original repository"),
    "BakLLaVA": ({"text_config": {"model_type": "mistral", "hidden_size": 48, "vocab_size": 400}}, "mistral"),
    "another projector": ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
    "a projector without bias": ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
    "several layers": ({"vision_feature_layer": [-2, -1]}, "one layer"),
    "[CLS] among the tokens": ({"vision_feature_select_strategy": "full"}, "'full'"),
    "another image token": ({"image_token_index": 7}, "does not number <image>"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_other_models_are_refused_by_name(case: str, llava: Path, tmp_path: Path) -> None:
    changes, fragment = OTHERS[case]
    folder = tmp_path / "other"
    shutil.copytree(llava, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        import_llava(folder, read_selector(["selector=all"]), tmp_path / "out")
    assert fragment in str(caught.value)
    assert not (tmp_path / "out").exists()


def _with_manifest(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    write_manifest(out)
    return out


def test_names_and_shapes_are_strict(llava: Path, tmp_path: Path) -> None:
    selector = read_selector(["selector=all"])
    extra = _rename(llava, tmp_path / "extra", lambda name: name, ["multi_modal_projector.linear_3.weight"])
    with pytest.raises(UserError, match="linear_3"):
        import_llava(extra, selector, tmp_path / "out")
    unknown = _rename(llava, tmp_path / "unknown", lambda name: name, ["language_model.model.layers.9.mlp.weight"])
    with pytest.raises(UserError, match=r"unknown language_model\.model\.layers\.9"):
        import_llava(unknown, selector, tmp_path / "out")
    shorter = _rename(llava, tmp_path / "shorter", lambda name: name.replace("layers.0.mlp", "layers.7.mlp"))
    with pytest.raises(UserError, match="missing"):
        import_llava(shorter, selector, tmp_path / "out")
    with pytest.raises(UserError, match=r"python -m anchorformer\.import_llava"):
        check_folder(_with_manifest(llava, tmp_path / "as_it_is"))
    with pytest.raises(UserError, match=r"no config\.json"):
        import_llava(tmp_path / "nowhere", selector, tmp_path / "out")


def test_arguments_are_read_or_refused(llava: Path, tmp_path: Path) -> None:
    assert read_selector(["selector=anchor", "selector.num_anchors=9"])["num_anchors"] == 9
    for wrong, fragment in (
        ([], "no selector=NAME"), (["selector=anchors"], "anchor"), (["num_anchors=9"], "num_anchors=9"),
        (["selector=base"], "one of all, anchor, average, cls_similarity"),
        (["selector.num_anchors=["], "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=fragment):
            read_selector(wrong)
    with pytest.raises(UserError, match="never seen"):
        import_llava(llava, read_selector(["selector=all", "selector.layer=-1"]), tmp_path / "out")
