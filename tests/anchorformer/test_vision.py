"""Vision towers of every family against Hugging Face's eager attention and hidden states, and what trimming means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    ViTConfig,
)

from anchorformer.contracts import VisionNeeds
from anchorformer.errors import UserError
from anchorformer.kernels import received
from anchorformer.selectors.anchor import AnchorSelectorConfig, select_anchors
from anchorformer.vision import VisionTower, image_key
from anchorformer.vision_families import FAMILIES

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
NEEDS = VisionNeeds(layer=-2, cls_scores=True)
# fp32, four tiny layers, sums in another order (fused or not): a hundred roundings of values of order one.
TOLERANCE = 1e-5


def _config(family: str) -> PreTrainedConfig:
    if family == "clip_vision_model":
        return CLIPVisionConfig(**SIZES, intermediate_size=64)
    if family == "siglip_vision_model":
        return SiglipVisionConfig(**SIZES, intermediate_size=64)
    if family == "dinov2":
        return Dinov2Config(**SIZES, mlp_ratio=2, layerscale_value=0.7)
    return Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, layerscale_value=0.7, num_register_tokens=3)


def _stock(family: str, attention: str = "eager") -> PreTrainedModel:
    """The untouched Hugging Face model, with weights large enough that attention is not uniform."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModel.from_config(_config(family), attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
        else:
            nn.init.normal_(parameter, std=0.3)
    return model


def _needs(family: str, layer: int = -2) -> VisionNeeds:
    return VisionNeeds(layer=layer, cls_scores=FAMILIES[family].has_cls)


def _tower(family: str, layer: int = -2) -> VisionTower:
    return VisionTower(_stock(family), _needs(family, layer)).requires_grad_(False)


def _pixels(batch: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, SIZES["image_size"], SIZES["image_size"])


def _without_registers(x: Tensor, dim: int, registers: int) -> Tensor:
    kept = [i for i in range(x.shape[dim]) if not 1 <= i <= registers]
    return x.index_select(dim, torch.tensor(kept))


@pytest.mark.parametrize("layer", [-1, -2, -3, 1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_scores_are_those_of_the_stock_model(family: str, layer: int) -> None:
    stock = _stock(family)
    with torch.no_grad():
        reference = stock(_pixels(), output_attentions=True, output_hidden_states=True)
    tower = _tower(family, layer)
    features = tower(_pixels())

    registers = tower.num_registers
    tokens = _without_registers(reference.hidden_states[layer], 1, registers)
    torch.testing.assert_close(features.tokens_BNV, tokens, atol=TOLERANCE, rtol=TOLERANCE)
    assert features.tokens_BNV.shape == (3, tower.num_tokens, tower.width)
    assert features.has_cls is tower.has_cls is FAMILIES[family].has_cls
    if not tower.has_cls:
        assert features.cls_scores_BHN is None
        return
    # Block i produces hidden state i + 1, so layer -2 is block -2 and layer 1 is block 0.
    attention = reference.attentions[layer if layer < 0 else layer - 1]
    row = _without_registers(attention[:, :, 0], 2, registers)
    assert features.cls_scores_BHN is not None
    assert features.cls_scores_BHN.dtype is torch.float32
    # Dropping registers renormalises: compare as shares of the kept tokens.
    torch.testing.assert_close(
        features.cls_scores_BHN.softmax(-1), row / row.sum(-1, keepdim=True), atol=TOLERANCE, rtol=TOLERANCE
    )
    assert row.std() * row.shape[-1] > 0.3, "attention is nearly uniform: the comparison would say little"
    assert torch.equal(select_anchors(features.cls_scores_BHN, 9), select_anchors(row, 9))


@pytest.mark.parametrize("queries_at_once", [7, 1000])
@pytest.mark.parametrize("layers", [(-2, -2), (-2, 1), (-1, -3), (2, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_other_selectors_read_is_that_of_the_stock_model(
    family: str, layers: tuple[int, int], queries_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it in one forward: [CLS] rows of several layers, received attention, the final features."""
    monkeypatch.setattr(received, "QUERIES_AT_ONCE", queries_at_once)
    layer, start_layer = layers
    stock, has_cls = _stock(family), FAMILIES[family].has_cls
    with torch.no_grad():
        reference = stock(_pixels(), output_attentions=True, output_hidden_states=True)
        final = getattr(stock, FAMILIES[family].final_norm)(reference.hidden_states[-1])
    needs = VisionNeeds(
        layer=layer, cls_attention_from=start_layer if has_cls else None, received=True, final=True, image_key=True
    )
    whole = VisionTower(stock, needs).requires_grad_(False)
    built = VisionTower.from_config(_config(family), needs).requires_grad_(False)
    built.load_state_dict(whole.state_dict())
    for tower in (whole, built):
        features = tower(_pixels())
        assert features.cls_scores_BHN is None

        def kept(x: Tensor, dim: int, registers: int = tower.num_registers) -> Tensor:
            return _without_registers(x, dim, registers)

        torch.testing.assert_close(features.tokens_BNV, kept(reference.hidden_states[layer], 1))
        assert features.final_BNV is not None
        torch.testing.assert_close(features.final_BNV, kept(final, 1), atol=TOLERANCE, rtol=TOLERANCE)
        attentions = [None, *reference.attentions]  # counted like hidden states
        assert features.received_BN is not None
        columns = attentions[layer].mean((1, 2))
        torch.testing.assert_close(features.received_BN, kept(columns, 1), atol=TOLERANCE, rtol=TOLERANCE)
        if has_cls:
            first, last = (each % len(attentions) for each in (start_layer, layer))
            rows = torch.stack([attentions[each][:, :, 0].mean(1) for each in range(first, last + 1)], 1)
            assert features.cls_attention_BLN is not None
            torch.testing.assert_close(features.cls_attention_BLN, kept(rows, 2), atol=TOLERANCE, rtol=TOLERANCE)
        assert torch.equal(features.image_key_B, image_key(_pixels()))


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_cls_queries_are_the_projections_of_the_stock_model(family: str) -> None:
    """Of a block before the tapped one, and of the last one, which therefore runs, untrained."""
    stock, projected = _stock(family), {"q": list[Tensor](), "k": list[Tensor]()}
    for name, module in stock.named_modules():
        kind = name.rpartition(".")[2]
        if kind in ("q_proj", "query", "k_proj", "key"):
            module.register_forward_hook(lambda _, __, out, kept=projected[kind[0]]: kept.append(out.detach()))
    with torch.no_grad():
        reference = stock(_pixels(), output_hidden_states=True)
    queries, keys = ([kept[block] for block in (3, 0)] for kept in projected.values())
    tower = VisionTower(stock, VisionNeeds(layer=2, qk=(-1, 1))).train()
    features = tower(_pixels())
    assert (tower.num_layers, tower.tapped_layer) == (4, 2)
    torch.testing.assert_close(
        features.tokens_BNV, _without_registers(reference.hidden_states[2], 1, tower.num_registers)
    )
    assert features.keys_BLNV is not None
    expected = _without_registers(torch.stack(keys, 1), 2, tower.num_registers)
    torch.testing.assert_close(features.keys_BLNV, expected, atol=TOLERANCE, rtol=TOLERANCE)
    if tower.has_cls:
        assert features.query_BLV is not None
        torch.testing.assert_close(features.query_BLV, torch.stack(queries, 1)[:, :, 0], atol=TOLERANCE, rtol=TOLERANCE)
    else:
        assert features.query_BLV is None
    assert not features.keys_BLNV.requires_grad
    assert not any(parameter.requires_grad for layer in tower._layers[2:] for parameter in layer.parameters())
    assert tower(_pixels(1)).keys_BLNV.shape[0] == 1, "what a forward left is not kept"


def test_the_key_of_an_image_is_its_own() -> None:
    pixels = _pixels(4)
    keys = image_key(pixels)
    assert keys.unique().numel() == 4
    assert torch.equal(image_key(pixels[2:3]), keys[2:3])
    pixels[0, 1, 2, 3] += 1
    assert (image_key(pixels) != keys).tolist() == [True, False, False, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_behind_the_tapped_layer_is_kept_or_run(family: str) -> None:
    tower = _tower(family)
    names = tower.state_dict().keys()
    assert all(name.startswith("model.") for name in names)
    behind = ("post_layernorm", "model.layernorm", "head", "mask_token")
    assert not any(part in name for name in names for part in behind)
    stock = _stock(family)
    kept_numel = sum(value.numel() for value in tower.state_dict().values())
    assert kept_numel < sum(value.numel() for value in stock.state_dict().values())
    for name, value in tower.state_dict().items():
        assert torch.equal(value, stock.state_dict()[name.removeprefix("model.")])
    built = VisionTower.from_config(_config(family), _needs(family))
    assert built.state_dict().keys() == names
    assert built.needs == tower.needs
    assert (built.num_tokens, built.num_heads, built.width, built.image_size) == (16 + tower.has_cls, 4, 32, 56)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unfrozen_tower_trains_every_parameter(family: str) -> None:
    tower = VisionTower(_stock(family), _needs(family)).train()
    assert tower.model.training
    features = tower(_pixels())
    (features.tokens_BNV * torch.randn_like(features.tokens_BNV)).sum().backward()
    for name, parameter in tower.named_parameters():
        # Keys of every softmax may be shifted by the same vector, so the key bias has no gradient by nature.
        if "register_tokens" not in name and not name.endswith(("k_proj.bias", "key.bias")):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    if features.cls_scores_BHN is not None:
        assert not features.cls_scores_BHN.requires_grad


def test_what_only_ranks_patches_is_never_trained() -> None:
    tower = VisionTower(_stock("clip_vision_model"), VisionNeeds(layer=2, final=True)).requires_grad_(True).train()
    features = tower(_pixels())
    assert features.final_BNV is not None
    assert not features.final_BNV.requires_grad
    features.tokens_BNV.square().sum().backward()
    trained = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    behind = ("layers.2", "layers.3", "post_layernorm")
    assert trained == {name for name in tower.state_dict() if not any(part in name for part in behind)}
    assert trained == {name for name, parameter in tower.named_parameters() if parameter.grad is not None}


def test_a_frozen_tower_has_no_graph_but_its_features_can_be_trained_through() -> None:
    tower = _tower("clip_vision_model")
    features = tower(_pixels().requires_grad_())
    assert not features.tokens_BNV.requires_grad
    layer = nn.Linear(tower.width, 5)
    layer(features.tokens_BNV).sum().backward()  # inference tensors could not be saved for this backward
    assert layer.weight.grad is not None


def test_a_frozen_tower_stays_free_of_noise_in_train_mode() -> None:
    config = Dinov2Config(**SIZES, drop_path_rate=0.5, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    tower = VisionTower.from_config(config, NEEDS)
    tower.train()
    tower.requires_grad_(False)  # frozen after train() was called
    pixels = _pixels()
    assert torch.equal(tower(pixels).tokens_BNV, tower(pixels).tokens_BNV)
    tower.train()
    assert not tower.model.training
    tower.requires_grad_(True).train()
    assert not torch.equal(tower(pixels).tokens_BNV, tower(pixels).tokens_BNV)


def test_scores_do_not_stay_on_the_module_and_do_not_depend_on_the_batch() -> None:
    tower = _tower("clip_vision_model")
    before = {name: set(vars(module)) for name, module in tower.named_modules()}
    together = tower(_pixels()).cls_scores_BHN
    assert {name: set(vars(module)) for name, module in tower.named_modules()} == before
    alone = tower(_pixels()[1:2]).cls_scores_BHN
    assert together is not None
    assert alone is not None
    torch.testing.assert_close(together[1:2], alone, atol=TOLERANCE, rtol=TOLERANCE)


def test_bf16_scores_are_fp32_and_choose_nearly_the_same_anchors() -> None:
    exact = _tower("clip_vision_model")(_pixels(16))
    half = _tower("clip_vision_model").bfloat16()(_pixels(16))
    assert half.tokens_BNV.dtype is torch.bfloat16
    assert half.cls_scores_BHN is not None
    assert half.cls_scores_BHN.dtype is torch.float32
    assert exact.cls_scores_BHN is not None
    one, two = (select_anchors(scores, 9).tolist() for scores in (exact.cls_scores_BHN, half.cls_scores_BHN))
    shared = sum(len(set(a) & set(b)) for a, b in zip(one, two, strict=True)) / (16 * 9)
    assert shared >= 0.95  # what true CLIP-L shapes gave in bf16: 0.95 to 0.98


def test_checkpointing_the_tower_leaves_gradients_and_scores_alone() -> None:
    def run(checkpointing: bool) -> tuple[Tensor, list[Tensor]]:
        tower = VisionTower(_stock("clip_vision_model"), NEEDS).train()
        if checkpointing:
            tower.model.gradient_checkpointing_enable({"use_reentrant": False})
        features = tower(_pixels())
        features.tokens_BNV.square().sum().backward()
        assert features.cls_scores_BHN is not None
        return features.cls_scores_BHN, [p.grad for p in tower.parameters() if p.grad is not None]

    (plain_scores, plain), (scores, gradients) = run(False), run(True)
    assert torch.equal(plain_scores, scores)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients, strict=True))


def test_the_tower_compiles_as_one_graph() -> None:
    tower = _tower("clip_vision_model")
    expected = tower(_pixels())
    found = torch.compile(tower, fullgraph=True, backend="eager")(_pixels())
    assert found.cls_scores_BHN is not None
    assert torch.equal(found.tokens_BNV, expected.tokens_BNV)
    torch.testing.assert_close(found.cls_scores_BHN, expected.cls_scores_BHN)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_tower_without_cls_is_refused_where_scores_are_needed() -> None:
    with pytest.raises(UserError, match=r"ranks patches by \[CLS\]") as caught:
        VisionTower(_stock("siglip_vision_model"), NEEDS)
    assert "'all'" in caught.value.expected
    with pytest.raises(UserError, match=r"ranks patches by \[CLS\]"):
        VisionTower.from_config(_config("siglip_vision_model"), NEEDS)


@pytest.mark.parametrize("layer", [0, 5, -5, -9])
def test_layers_it_does_not_have_are_refused(layer: int) -> None:
    with pytest.raises(UserError, match=f"layer={layer}"):
        VisionTower.from_config(_config("clip_vision_model"), VisionNeeds(layer=layer))


@pytest.mark.parametrize("start_layer", [0, 4, 9, -5, -1])
def test_a_sum_over_layers_begins_at_one_that_comes_before_the_tapped_one(start_layer: int) -> None:
    with pytest.raises(UserError, match="start_layer" if start_layer in (0, 9, -5) else "wrong order") as caught:
        VisionTower.from_config(_config("clip_vision_model"), VisionNeeds(cls_attention_from=start_layer))
    assert f"start_layer={start_layer}" in caught.value.found


def test_unknown_families_are_refused() -> None:
    with pytest.raises(UserError, match="model_type='vit'"):
        VisionTower.from_config(ViTConfig(), VisionNeeds())


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match="H = W = 56"):
        _tower("dinov2")(torch.zeros(1, 3, 70, 70))


def test_replacing_the_attention_of_the_tower_is_noticed() -> None:
    tower = _tower("clip_vision_model")
    tower.model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="left no attention scores"):
        tower(_pixels())


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_published_backbones_load(family: str, tmp_path: Path) -> None:
    _stock(family).save_pretrained(tmp_path)
    tower = VisionTower.from_backbone(tmp_path, _needs(family))
    for name, value in _tower(family).state_dict().items():
        assert torch.equal(tower.state_dict()[name], value), name


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_tower_of_a_two_tower_checkpoint_loads(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**SIZES, "intermediate_size": 64}
    if family == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path)
    tower = VisionTower.from_backbone(tmp_path, VisionNeeds())
    stock = model.vision_model.state_dict()
    for name, value in tower.state_dict().items():
        assert torch.equal(value, stock[name.removeprefix("model.")]), name


def test_an_incomplete_backbone_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _stock("clip_vision_model").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    needed = [name for name in weights if "layers.1.mlp.fc1.weight" in name]
    save_file({k: v for k, v in weights.items() if k not in needed}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.fc1\.weight"):
        VisionTower.from_backbone(tmp_path, NEEDS)
    # What lies behind the tapped layer may be missing.
    behind = {k: v for k, v in weights.items() if "layers.3" not in k and "post_layernorm" not in k}
    save_file(behind, tmp_path / "model.safetensors", {"format": "pt"})
    VisionTower.from_backbone(tmp_path, NEEDS)


class _HolderConfig(PreTrainedConfig):
    model_type = "vision_tower_holder"
    vision: Any = None


class _Holder(PreTrainedModel):
    """A model that owns a tower, loaded the way every run loads its model: empty on the meta device, then filled."""

    config_class = _HolderConfig
    base_model_prefix = "model"

    def __init__(self, config: _HolderConfig) -> None:
        super().__init__(config)
        self.vision_tower = VisionTower.from_config(_config(config.vision), AnchorSelectorConfig(num_anchors=9).needs)
        self.post_init()


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.has_cls])
def test_a_tower_inside_a_model_survives_save_and_load(family: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = _Holder(_HolderConfig(vision=family)).requires_grad_(False)
    model.save_pretrained(tmp_path)
    again, report = _Holder.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    again.requires_grad_(False)
    first, second = model.vision_tower(_pixels()), again.vision_tower(_pixels())
    assert torch.equal(first.tokens_BNV, second.tokens_BNV)
    assert first.cls_scores_BHN is not None
    assert second.cls_scores_BHN is not None
    assert torch.equal(first.cls_scores_BHN, second.cls_scores_BHN)
    assert json.loads((tmp_path / "config.json").read_text())["vision"] == family
