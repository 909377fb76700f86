"""Connectors against the published modules: outputs and gradients within the tolerance stated beside the vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from anchorformer.connectors.anchor_former import AnchorFormerConnectorConfig
from anchorformer.connectors.base import Connector
from anchorformer.connectors.c_abstractor import CAbstractorConfig
from anchorformer.connectors.mlp import MlpConfig
from anchorformer.connectors.resampler import ResamplerConfig
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.convert import from_published, to_published
from anchorformer.selectors.anchor import AnchorSelectorConfig
from anchorformer.vision import VisionTower

# Stated in the vectors' README: largest difference over largest absolute value of the reference tensor.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE, TOWER_TOLERANCE = 2e-5, 1e-4, 5e-5


def _assert_near(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape, what
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


def _float_file(path: Path) -> dict[str, Tensor]:
    return {key: value.float() for key, value in load_file(path).items()}


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("w."): value for key, value in tensors.items() if key.startswith("w.")}


def _sizes(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "depth": case["depth"],
        "num_heads": case["heads"],
        "head_dim": case["dim_head"],
        "ff_mult": case.get("ff_mult", 4),
    }


def _stack_only(connector: Connector, weights: dict[str, Tensor]) -> Connector:
    """The vectors of the bare resampler: its weights, with a projector that lets everything pass."""
    wanted = connector.state_dict()
    padded = {f"0.{key}": value for key, value in weights.items()}
    padded |= {
        f"{module}.{kind}": wanted[f"projector.{module - 1}.{kind}"] for module in (1, 3) for kind in ("weight", "bias")
    }
    connector.load_state_dict(from_published(padded, wanted))
    connector.projector = nn.Identity()
    return connector


def _compare_gradients(connector: Connector, tensors: dict[str, Tensor], prefix: str, inputs: dict[str, Tensor]) -> int:
    """Compares every gradient the file stores, whole or as a corner; returns how many of the weights' there were."""
    gradients = {name: parameter.grad for name, parameter in connector.named_parameters() if parameter.grad is not None}
    published = to_published(gradients)
    compared = 0
    for key, expected in tensors.items():
        kind, _, name = key.removeprefix(prefix).partition(".")
        if not key.startswith(prefix) or kind not in ("grad", "gradcorner"):
            continue
        found = published[name if name in published else f"0.{name}"]
        part = found if kind == "grad" or found.ndim == 1 else found[: expected.shape[0], : expected.shape[1]]
        _assert_near(part, expected, GRADIENT_TOLERANCE, key)
        compared += 1
    for name, value in inputs.items():
        if f"{prefix}grad_{name}" in tensors:
            assert value.grad is not None
            _assert_near(value.grad, tensors[f"{prefix}grad_{name}"], GRADIENT_TOLERANCE, f"{prefix}grad_{name}")
    return compared


def test_every_connector_file(golden_root: Path) -> None:
    checked = []
    for case in json.loads((golden_root / "connector/info.json").read_text()):
        tensors = _float_file(golden_root / "connector" / case["file"])
        weights = _weights(tensors)
        if "net.0.b1.conv1.conv.weight" in weights:
            continue  # C-Abstractor; see the test below
        width = case.get("dim", tensors["x"].shape[-1])
        sizes = _sizes(case)
        if "hidden" in case:
            connector = AnchorFormerConnectorConfig(**sizes).build(width, case["hidden"])
            connector.load_state_dict(from_published(weights, connector.state_dict()))
            _check_path(connector, tensors, "", case["file"])
        else:
            anchor = AnchorFormerConnectorConfig(**sizes).build(width, width)
            _check_path(_stack_only(anchor, weights), tensors, "anchor.", case["file"])
            learned = ResamplerConfig(num_queries=weights["latents"].shape[0], **sizes).build(width, width)
            _check_path(_stack_only(learned, weights), tensors, "plain.", case["file"])
        checked.append(case["file"])
    assert checked


def _check_path(connector: Connector, tensors: dict[str, Tensor], prefix: str, file: str) -> None:
    media = tensors["x"].clone().requires_grad_()
    query = tensors["dynamic_query"].clone().requires_grad_()
    out = connector(Anchors(query, None), VisionFeatures(media, None, True))
    _assert_near(out, tensors[f"{prefix}out"], OUTPUT_TOLERANCE, f"{file} {prefix}out")
    weights_of_the_sum = tensors["R_plain" if prefix == "plain." and "R_plain" in tensors else "R"]
    if weights_of_the_sum.shape != out.shape:
        return  # the real-width file stores no gradients of the learned queries
    (out * weights_of_the_sum).sum().backward()
    compared = _compare_gradients(connector, tensors, prefix, {"x": media, "query": query})
    stored = [key for key in tensors if key.startswith((f"{prefix}grad.", f"{prefix}gradcorner."))]
    assert compared == len(stored)
    assert stored or prefix == "plain."


def test_skipping_the_stack_is_the_mlp_connector(golden_root: Path) -> None:
    """Published ablation: anchors straight into the MLP, with the projector file's weights and inputs."""
    files = [case["file"] for case in json.loads((golden_root / "connector/info.json").read_text()) if "hidden" in case]
    for file in files:
        tensors = _float_file(golden_root / "connector" / file)
        connector = MlpConfig().build(tensors["w.1.weight"].shape[1], tensors["w.1.weight"].shape[0])
        renumbered = {"0": "1", "2": "3"}
        published = {
            f"{ours}.{kind}": tensors[f"w.{theirs}.{kind}"]
            for ours, theirs in renumbered.items()
            for kind in ("weight", "bias")
        }
        connector.load_state_dict(from_published(published, connector.state_dict()))
        out = connector(Anchors(tensors["dynamic_query"], None), VisionFeatures(tensors["x"], None, True))
        skipped = _float_file(golden_root / "connector/projector_skip_resampler.safetensors")
        _assert_near(out, skipped["out"], OUTPUT_TOLERANCE, file)


def _of_timm(ours: str) -> str:
    """What timm's `RegStage` calls a tensor of ours."""
    stage, block, layer, kind = ours.split(".")
    layers = {
        "enter": "conv1.conv", "norm_enter": "conv1.bn", "around": "conv2.conv", "norm_around": "conv2.bn",
        "squeeze": "se.fc1", "excite": "se.fc2", "leave": "conv3.conv", "norm_leave": "conv3.bn",
    }  # fmt: skip
    return f"net.{0 if stage == 'before' else 2}.b{int(block) + 1}.{layers[layer]}.{kind}"


def test_c_abstractor(golden_root: Path) -> None:
    """The two stages and the pooling, forward and every gradient; what is a linear here is a 1x1 convolution there."""
    cases = [case for case in json.loads((golden_root / "connector/info.json").read_text()) if "keys" in case]
    for case in cases:
        tensors = _float_file(golden_root / "connector" / case["file"])
        weights = _weights(tensors)
        connector = CAbstractorConfig(num_queries=case["n"], depth=case["depth"]).build(case["dim"], case["dim"])
        connector.projector = nn.Identity()
        stages = dict(connector.named_parameters())
        assert {_of_timm(name) for name in stages} == weights.keys()
        with torch.no_grad():
            for name, value in stages.items():
                value.copy_(weights[_of_timm(name)].view_as(value))
        media = tensors["x"].clone().requires_grad_()
        out = connector(Anchors(media[:, :1], None), VisionFeatures(media, None, True))
        _assert_near(out, tensors["out"], OUTPUT_TOLERANCE, f"{case['file']} out")
        (out * tensors["R"]).sum().backward()
        _assert_near(media.grad, tensors["grad_x"], GRADIENT_TOLERANCE, f"{case['file']} grad_x")
        for name, value in stages.items():
            expected = tensors[f"grad.{_of_timm(name)}"].view_as(value)
            _assert_near(value.grad, expected, GRADIENT_TOLERANCE, f"{case['file']} {name}")
    assert cases


def test_parameter_counts(golden_root: Path) -> None:
    """The table also says where the paper's own numbers disagree; those are documented, not reproduced."""
    counts = json.loads((golden_root / "params/param_counts.json").read_text())
    for row in counts["table"]:
        with torch.device("meta"):
            connector = AnchorFormerConnectorConfig(depth=row["depth"]).build(1024, 4096)
            learned = ResamplerConfig(num_queries=144, depth=row["depth"]).build(1024, 5120)
        assert _count(connector) - _count(connector.get_submodule("projector")) == row["without_latents"]
        assert _count(connector.get_submodule("projector")) == counts["mlp2x_1024_to_4096"]
        assert _count(connector) + counts["latents_144"] == row["plus_mlp_to_4096"]
        assert _count(learned) == row["plus_mlp_to_5120"]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_tower_selector_and_connector_together(golden_root: Path, tmp_path: Path) -> None:
    """Published vision tower weights (as an older transformers named them) to embeddings."""
    config = json.loads((golden_root / "e2e/config.json").read_text())
    expected = load_file(golden_root / "e2e/vision.safetensors")
    folder = tmp_path / "clip"
    folder.mkdir()
    vision = {"model_type": "clip_vision_model", **config["clip"], **config["clip_extra"]}
    (folder / "config.json").write_text(json.dumps(vision))
    (folder / "model.safetensors").write_bytes((golden_root / "e2e/clip.safetensors").read_bytes())

    selector_config = AnchorSelectorConfig(num_anchors=config["T"], layer=config["select_layer"])
    tower = VisionTower.from_backbone(folder, selector_config.needs, dtype=torch.float32).requires_grad_(False)
    features = tower(expected["pixels"])
    assert features.cls_scores_BHN is not None
    _assert_near(features.cls_scores_BHN.softmax(-1), expected["cls_attention"], TOWER_TOLERANCE, "cls_attention")
    _assert_near(features.tokens_BNV, expected["features"], TOWER_TOLERANCE, "features")

    anchors = selector_config.build(tower.num_tokens, tower.num_heads, tower.has_cls)(features)
    assert anchors.indices_BT is not None
    assert torch.equal(anchors.indices_BT, expected["anchor_indices"])
    _assert_near(anchors.tokens_BTV, expected["anchors"], TOWER_TOLERANCE, "anchors")

    published = load_file(golden_root / "e2e/projector.safetensors")
    connector = AnchorFormerConnectorConfig(**_sizes(config["connector"])).build(
        tower.width, config["llama"]["hidden_size"]
    )
    connector.load_state_dict(from_published(published, connector.state_dict()))
    _assert_near(connector(anchors, features), expected["image_embeds"], TOWER_TOLERANCE, "image_embeds")
