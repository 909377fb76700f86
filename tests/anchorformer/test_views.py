"""Models and processors with tiles: per tile and over all tiles of an image, packed, padded, generated and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from anchorformer.connectors.anchor_former import AnchorFormerConnectorConfig
from anchorformer.connectors.base import ConnectorConfig
from anchorformer.connectors.c_abstractor import CAbstractorConfig
from anchorformer.contracts import VisionFeatures
from anchorformer.errors import UserError
from anchorformer.parts import parse_parts
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.selectors.all import AllSelectorConfig
from anchorformer.selectors.anchor import AnchorSelectorConfig
from anchorformer.selectors.average import AverageSelectorConfig
from anchorformer.selectors.mean_pool import MeanPoolSelectorConfig
from anchorformer.tiling import Select, Tiling
from anchorformer.views import build_selector, embeddings_per_view, join_tiles
from anchorformer.weights import load_model
from data.collate import collate

ROOT = Path(__file__).resolve().parents[2]
GRIDS = [[1, 2], [2, 1], [2, 2]]
TOLERANCE = 1e-5
SIZES = [(40, 20), (30, 70), (64, 60), (28, 28)]


class Assemble(Protocol):
    def __call__(self, *, tiling: dict[str, Any]) -> Path: ...


class Case:
    """A model with its processor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = load_model(folder, torch.float32).eval()
        self.processor = AnchorFormerProcessor.from_pretrained(folder)

    def logits(self, batch: Any, **pixels: Any) -> Tensor:
        return self.model(
            input_ids=batch.input_ids_S[None], position_ids=batch.position_ids_S[None], cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen, pixel_values=batch.tiles_B3HW, tile_counts=batch.tile_counts, **pixels,
        ).logits[0]  # fmt: skip


@pytest.fixture(scope="module", params=["tile", "image"])
def case(request: pytest.FixtureRequest, assemble_tiny: Assemble) -> Case:
    return Case(assemble_tiny(tiling={"grids": GRIDS, "select": request.param}))


def picture(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


PICTURES = [picture(size) for size in SIZES]
ASKED = [
    ([("user", "<image>\nwhat color is the star?")], PICTURES[:1]),
    ([("user", "<image> <image>\nhow many objects are there?")], PICTURES[1:3]),
    ([("user", "describe the image.")], []),
    ([("user", "the top left <image>")], PICTURES[3:]),
]


def test_one_length_for_measure_encode_and_model(case: Case) -> None:
    each = case.model.num_image_tokens
    assert each == case.processor.num_image_tokens == 9
    for turns, images in ASKED:
        told = [*turns, ("assistant", "red")]
        sizes = [image.size for image in images] if case.processor.needs_sizes else []
        example = case.processor.encode(told, images, sample_id="s")
        assert case.processor.measure(told, len(images), sizes=sizes).length == example.input_ids_S.numel()
        counts = [case.processor.image_transform.count(image.size) for image in images]
        assert example.tile_counts == tuple(counts)
        views = sum(counts) if case.model.tiling.select is Select.tile else len(counts)
        assert int((example.input_ids_S == case.processor.image_token_id).sum()) == each * views


def test_a_saved_processor_and_model_tile_as_before(case: Case, tmp_path: Path) -> None:
    case.processor.save_pretrained(tmp_path)
    assert AnchorFormerProcessor.from_pretrained(tmp_path).image_transform == case.processor.image_transform
    assert case.model.tiling == case.processor.image_transform.tiling
    assert case.processor.image_transform.tiling.grids == ((1, 2), (2, 1), (2, 2))


@torch.no_grad()
def test_packed_separate_and_padded_agree(case: Case) -> None:
    examples = [case.processor.encode([*t, ("assistant", "red")], i, sample_id="s") for t, i in ASKED]
    batch = collate(examples)
    assert len(set(batch.tile_counts or ())) > 1
    packed = case.logits(batch).split([example.input_ids_S.numel() for example in examples])
    rows = case.processor.pad([example.input_ids_S for example in examples])
    padded = case.model(
        **rows, position_ids=(rows["attention_mask"].cumsum(1) - 1).clamp(min=0), pixel_values=batch.tiles_B3HW,
        tile_counts=list(batch.tile_counts or ()),
    ).logits  # fmt: skip
    for number, example in enumerate(examples):
        alone = case.logits(collate([example]))
        for other in (packed[number], padded[number, -len(alone) :]):
            assert (other - alone).abs().max() <= TOLERANCE * alone.abs().max()


@torch.no_grad()
def test_batched_generation_equals_single(case: Case) -> None:
    def generate(asked: list[Any], **options: Any) -> list[str]:
        inputs = case.processor([images for _, images in asked], conversations=[turns for turns, _ in asked])
        ids = case.model.generate(**inputs, do_sample=False, max_new_tokens=6, **options)
        return case.processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :])

    together = generate(ASKED)
    assert together == [text for one in ASKED for text in generate([one])]
    beams = generate(ASKED, num_beams=2, num_return_sequences=2)
    assert beams == [text for one in ASKED for text in generate([one], num_beams=2, num_return_sequences=2)]


def test_a_text_only_batch_still_trains_the_connector(case: Case) -> None:
    case.model.train()
    examples = [case.processor.encode([*ASKED[2][0], ("assistant", "red")], [], sample_id="s")]
    case.logits(collate(examples)).sum().backward()
    gradients = [parameter.grad for parameter in case.model.connector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    case.model.zero_grad()
    case.model.eval()


def test_lost_and_foreign_counts_are_refused(case: Case) -> None:
    tiles = torch.zeros(6, 3, 28, 28, dtype=torch.uint8)
    for counts in ([3, 2], [3, 3, 3], [6]):
        with pytest.raises(UserError, match="tiles and images do not match"):
            case.model.encode_images(tiles, counts)
    if case.model.tiling.select is Select.image:
        with pytest.raises(UserError, match="tile_counts=None"):
            case.model.encode_images(tiles)
    else:
        assert case.model.encode_images(tiles).shape[:2] == (6, 9)


@torch.no_grad()
def test_a_view_of_one_tile_is_the_tile(assemble_tiny: Assemble, tiny_folder: Path) -> None:
    plain = load_model(tiny_folder, torch.float32).eval()
    joint = Case(assemble_tiny(tiling={"grids": [[1, 1]], "overview": False, "select": "image"})).model
    joint.load_state_dict(plain.state_dict())
    tiles = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(joint.encode_images(tiles), plain.encode_images(tiles), atol=1e-6)


def features_of(tiles: int, has_cls: bool = True, patches: int = 16, heads: int = 4, width: int = 8) -> VisionFeatures:
    generator = torch.Generator().manual_seed(tiles)
    tokens = patches + has_cls
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return VisionFeatures(
        tokens_BNV=draw(tiles, tokens, width), has_cls=has_cls,
        cls_scores_BHN=draw(tiles, heads, tokens) if has_cls else None,
        cls_attention_BLN=draw(tiles, 2, tokens).softmax(-1) if has_cls else None,
        received_BN=draw(tiles, tokens).softmax(-1), final_BNV=draw(tiles, tokens, width),
        query_BLV=draw(tiles, 2, width) if has_cls else None, keys_BLNV=draw(tiles, 2, tokens, width),
        image_key_B=torch.arange(tiles) + 2**32 - 3,
    )  # fmt: skip


@pytest.mark.parametrize("has_cls", [True, False])
def test_a_joint_view_is_one_large_image(has_cls: bool) -> None:
    tiles, cls = features_of(8, has_cls), int(has_cls)
    joint = join_tiles(tiles, [3, 5])
    assert joint.sizes == (cls + 48, cls + 80)
    assert joint.mask_BN is not None
    assert joint.mask_BN.sum(1).tolist() == list(joint.sizes)
    start = 0
    for row, count in enumerate((3, 5)):
        own = slice(start, start + count)
        size = joint.sizes[row]
        assert torch.equal(joint.tokens_BNV[row, cls:size], tiles.tokens_BNV[own, cls:].flatten(0, 1))
        assert torch.equal(joint.tokens_BNV[row, :cls], tiles.tokens_BNV[own, :cls].mean(0))
        assert joint.keys_BLNV is not None
        assert tiles.keys_BLNV is not None
        keys = joint.keys_BLNV[row, :, :size]
        assert torch.equal(keys[:, cls:], tiles.keys_BLNV[own, :, cls:].movedim(0, 1).flatten(1, 2))
        assert torch.equal(keys[:, :cls], tiles.keys_BLNV[own, :, :cls].mean(0))
        if joint.query_BLV is not None and tiles.query_BLV is not None:
            assert torch.equal(joint.query_BLV[row], tiles.query_BLV[own].mean(0))
        assert joint.received_BN is not None
        assert torch.isclose(joint.received_BN[row, :size].sum(), torch.tensor(1.0))
        if joint.cls_scores_BHN is not None and tiles.cls_scores_BHN is not None:
            attention = joint.cls_scores_BHN[row, :, :size].softmax(-1)
            each = tiles.cls_scores_BHN[own].softmax(-1)
            assert torch.allclose(attention[:, 0], each[..., 0].mean(0))
            assert torch.allclose(attention[:, 1:], each[..., 1:].movedim(0, 1).flatten(1) / count)
        start += count


ANCHOR_OF_9 = {"_target_": "anchorformer.selectors.anchor.AnchorSelectorConfig", "num_anchors": 9}
MLP = {"_target_": "anchorformer.connectors.mlp.MlpConfig"}
SPANNING = ["all", "anchor", "average", "fastervlm", "vtc_cls", "received", "cls_similarity", "pca", "random"]


@pytest.mark.parametrize("name", SPANNING)
def test_an_image_has_the_same_anchors_in_any_batch(name: str) -> None:
    values = yaml.safe_load((ROOT / "conf" / "selector" / f"{name}.yaml").read_text())
    config = parse_parts(values if name == "all" else values | {"num_anchors": 13}, MLP)[0]
    tiling = Tiling(grids=((1, 2), (2, 2)) if name != "all" else ((2, 2),), select=Select.image)
    counts = [3, 5, 5, 3] if name != "all" else [5, 5]
    tiles = features_of(sum(counts))
    selector = build_selector(tiling, config, 17, 4, True)
    together = selector(join_tiles(tiles, counts))
    assert together.indices_BT is not None
    start = 0
    for row, count in enumerate(counts):
        own = {n: v[start : start + count] for n, v in vars(tiles).items() if isinstance(v, Tensor)}
        alone = selector(join_tiles(VisionFeatures(has_cls=True, **own), [count]))
        assert alone.indices_BT is not None
        assert torch.equal(together.indices_BT[row], alone.indices_BT[0])
        assert torch.equal(together.tokens_BTV[row], alone.tokens_BTV[0])
        assert together.indices_BT[row].max() < 1 + count * 16
        start += count


def spanning_connectors() -> list[Any]:
    """Every connector of conf/ that may look at all tiles of an image, two layers deep."""
    found = []
    for path in sorted((ROOT / "conf" / "connector").glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        if "defaults" not in values:
            config = parse_parts(ANCHOR_OF_9, values | ({"depth": 2} if "depth" in values else {}))[1]
            found += [pytest.param(config, id=path.stem)] if config.spans_tiles else []
    return found


@torch.no_grad()
@pytest.mark.parametrize("config", spanning_connectors())
def test_an_image_has_the_same_embeddings_in_any_batch(config: ConnectorConfig) -> None:
    width, counts = 64, [1, 4, 2]
    torch.manual_seed(0)
    connector = config.build(width, 16).eval()
    tiles = features_of(sum(counts), width=width)
    selector = build_selector(
        Tiling(grids=((1, 1), (1, 2), (2, 2)), overview=False, select=Select.image),
        parse_parts(ANCHOR_OF_9, MLP)[0], 17, 4, True,
    )  # fmt: skip
    features = join_tiles(tiles, counts)
    together = connector(selector(features), features)
    start = 0
    for row, count in enumerate(counts):
        own = {n: v[start : start + count] for n, v in vars(tiles).items() if isinstance(v, Tensor)}
        single = join_tiles(VisionFeatures(has_cls=True, **own), [count])
        alone = connector(selector(single), single)[0]
        assert (together[row] - alone).abs().max() <= TOLERANCE * alone.abs().max()
        start += count


def test_what_needs_the_raster_of_a_tile_is_refused() -> None:
    over_all = Tiling(grids=((2, 2),), overview=False, select=Select.image)
    ragged = Tiling(grids=((1, 2), (2, 2)), select=Select.image)
    fits: ConnectorConfig = AnchorFormerConnectorConfig()
    for selector, connector, words in (
        (MeanPoolSelectorConfig(), fits, "mean_pool"),
        (AverageSelectorConfig(num_anchors=9), CAbstractorConfig(), "c_abstractor"),
    ):
        with pytest.raises(UserError, match=words):
            embeddings_per_view(over_all, selector, connector, 17, 4, True)
        embeddings_per_view(Tiling(grids=((2, 2),)), MeanPoolSelectorConfig(), fits, 17, 4, True)
    with pytest.raises(UserError, match="depends on its tiles"):
        embeddings_per_view(ragged, AllSelectorConfig(), fits, 17, 4, True)
    assert embeddings_per_view(over_all, AllSelectorConfig(), fits, 17, 4, True) == 64
    # More anchors than a tile has patches: allowed where an image has them.
    assert embeddings_per_view(ragged, AnchorSelectorConfig(num_anchors=49), fits, 17, 4, True) == 49
