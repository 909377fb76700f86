"""DAMRO against a plain statement of it: the formula, the outliers, batches, every connector, conversations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from anchorformer.answering import Answer
from anchorformer.chat import chat, read_decoding
from anchorformer.contracts import Anchors, VisionFeatures, VisionNeeds
from anchorformer.decoding.base import Sight
from anchorformer.decoding.damro import Damro, DamroConfig, contrasted, outlier_indices
from anchorformer.errors import UserError
from anchorformer.images import normalise
from anchorformer.opening import Opened
from anchorformer.seen import Seen, look
from anchorformer.vision import VisionTower
from tests.anchorformer.test_correlation import TINY
from tests.anchorformer.test_generation import ASKED, CONF, ONE, SMALL, WIDE, Case
from tests.conftest import Assemble

DAMRO = DamroConfig(top_k=3, alpha=1.5, beta=0.05)
Asked = list[tuple[Any, list[Image.Image]]]


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Case:
    return Case(tiny_folder)


def answers(case: Case, asked: Asked, config: DamroConfig | None, **changes: Any) -> list[list[int]]:
    """What is said token by token, `config=None` greedily."""
    inputs = case.processor([images for _, images in asked], conversations=[turns for turns, _ in asked])
    tiles, counts = inputs.pop("pixel_values", None), inputs.pop("tile_counts", None)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, **changes}
    if tiles is None:
        settings["image_embeds"] = None
    elif config is None:
        settings["image_embeds"] = case.model.encode_images(tiles, counts)
    if config is not None:
        decoding = config.build(case.model)
        sight = None if tiles is None else decoding.see(tiles, counts)
        settings["image_embeds"] = None if sight is None else sight.embeds
        settings["logits_processor"] = decoding.logits_processors(inputs["input_ids"], inputs["attention_mask"], sight)
    length = inputs["input_ids"].shape[1]
    return [row[length:].tolist() for row in case.model.generate(**inputs, **settings)]


@torch.no_grad()
def plainly(case: Case, asked: Any, config: DamroConfig, connect: Any, steps: int = 6) -> list[int]:
    """One prompt, every position read anew in every step, the tower's attention from its hooked projections."""
    turns, images = asked
    model = case.model
    inputs = case.processor([images], conversations=[turns])
    tower = model.vision_tower
    seen: dict[str, Tensor] = {}
    block = tower.model.encoder.layers[tower.tapped_layer - 1].self_attn
    hooks = [
        getattr(block, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    features = tower(normalise(inputs["pixel_values"], model.config.image_mean, model.config.image_std))
    for hook in hooks:
        hook.remove()
    width = seen["q_proj"].shape[-1]
    attention = (seen["q_proj"] @ seen["k_proj"].mT * width**-0.5).softmax(-1)[:, 0, 1:]
    outliers = attention.topk(config.top_k).indices
    tokens = torch.stack([features.tokens_BNV[i, 1:][row] for i, row in enumerate(outliers)])
    contrast = connect(tokens, features, outliers + 1)
    own = model.encode_images(inputs["pixel_values"], inputs.get("tile_counts"))
    ids, said = inputs["input_ids"][0].tolist(), list[int]()
    other, views = list[int](), 0
    for token in ids:  # as many placeholders as the contrast has embeddings, for every view
        if token != model.image_token_id:
            other.append(token)
        else:
            other += [token] * contrast.shape[1] * (views % own.shape[1] == 0)
            views += 1
    for _ in range(steps):
        logits, negative = (
            model(
                input_ids=torch.tensor([prompt + said]), attention_mask=torch.ones(1, len(prompt + said)),
                image_embeds=embeds,
            ).logits[0, -1].double()
            for prompt, embeds in ((ids, own), (other, contrast))
        )  # fmt: skip
        logits[model.image_token_id] = -torch.inf
        probabilities = logits.softmax(-1)
        final = (1 + config.alpha) * logits - config.alpha * negative
        final[probabilities < config.beta * probabilities.max()] = -torch.inf
        said.append(int(final.argmax()))
    return said


def tokens_alone(model: Any) -> Any:
    return lambda tokens, features, indices: model.connector(
        Anchors(tokens, None), VisionFeatures(tokens, None, has_cls=False)
    )


def test_the_formula() -> None:
    logits, other = torch.randn(4, 50).double() * 3, torch.randn(4, 50).double() * 3
    for alpha, beta in ((0.5, 0.1), (2.0, 0.3), (1.0, 1.0)):
        found = contrasted(logits, other, alpha, beta)
        for row in range(4):
            probabilities = logits[row].softmax(0)
            for token in range(50):
                if probabilities[token] < beta * probabilities.max() * (1 - 1e-9):
                    assert found[row, token] == -torch.inf
                elif probabilities[token] > beta * probabilities.max() * (1 + 1e-9):
                    expected = logits[row, token] + alpha * (logits[row, token] - other[row, token])
                    assert abs(float(found[row, token] - expected)) < 1e-9
    assert torch.equal(contrasted(logits, other, 0.0, 1e-300), logits)


def test_outliers_are_those_of_one_big_head_in_descending_order_and_ties_go_to_the_lower_patch() -> None:
    query, keys = torch.randn(3, 8), torch.randn(3, 20, 8)
    keys[:, 7] = keys[:, 3]
    found = outlier_indices(query, keys, 19)
    for row in range(3):
        attention = (keys[row].double() @ query[row].double() / 8**0.5).softmax(0).tolist()
        attention[7] = attention[3]
        assert found[row].tolist() == sorted(range(1, 20), key=lambda i: (-attention[i], i))


def test_answers_are_those_of_a_plain_statement(tiny: Case) -> None:
    differs = False
    for asked in (ASKED[0], ASKED[1], ASKED[3]):
        expected = plainly(tiny, asked, DAMRO, tokens_alone(tiny.model))
        assert answers(tiny, [asked], DAMRO) == [expected]
        differs |= answers(tiny, [asked], None) != [expected]
    assert differs, "greedy says the same, so nothing is shown"


def test_a_batch_is_answered_as_its_rows_alone(tiny: Case) -> None:
    together = answers(tiny, ASKED, DAMRO)
    assert together == [answer for one in ASKED for answer in answers(tiny, [one], DAMRO)]
    assert together[2] == answers(tiny, [ASKED[2]], None)[0], "no image, no contrast"
    assert together != answers(tiny, ASKED, None)


def test_without_weight_it_is_greedy_to_the_bit(tiny: Case) -> None:
    nothing = replace(DAMRO, alpha=0.0)
    assert answers(tiny, ASKED, nothing) == answers(tiny, ASKED, None)
    inputs = tiny.processor([[ONE]], conversations=[ASKED[0][0]])
    decoding = nothing.build(tiny.model)
    sight = decoding.see(inputs["pixel_values"], inputs.get("tile_counts"))
    assert torch.equal(sight.embeds, tiny.model.encode_images(inputs["pixel_values"], inputs.get("tile_counts")))
    processor = decoding.logits_processors(inputs["input_ids"], inputs["attention_mask"], sight)[0]
    scores = torch.randn(1, 50)
    found = processor(inputs["input_ids"], torch.nn.functional.pad(scores, (0, _vocabulary(tiny) - 50)))[0, :50]
    kept = found.isfinite()
    assert torch.equal(found[kept], scores[0][kept])
    assert kept[scores[0].argmax()]


def _vocabulary(case: Case) -> int:
    return int(case.model.get_input_embeddings().num_embeddings)


def _connectors() -> dict[str, dict[str, Any]]:
    """By name, without those that are another one at another size."""
    found = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CONF / "connector").glob("*.yaml"))}
    return {name: values for name, values in found.items() if "defaults" not in values}


KINDS = ("anchor_former", "c_abstractor", "resampler")
"""One of each way to an image of nothing but outliers: they are queries, a raster, or keys and values."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in _connectors()]
)
def test_every_connector_has_a_contrast(name: str, assemble_tiny: Assemble) -> None:
    values = _connectors()[name]
    connector = {key: SMALL.get(key, value) if value else value for key, value in values.items()}
    case = Case(assemble_tiny(connector=connector))
    model = case.model
    decoding = DAMRO.build(model)
    assert isinstance(decoding, Damro)
    tiles = case.processor.image_transform.tiles([ONE, WIDE])
    sight = decoding.see(tiles)
    assert torch.equal(sight.embeds, model.encode_images(tiles))
    contrast = sight.contrast_XKD
    assert contrast is not None
    follows = name in ("anchor_former", "identity", "mlp")
    assert contrast.shape[:2] == (2, 3 if follows else model.num_image_tokens)
    # What is no outlier changes nothing.
    features = decoding._tower(normalise(tiles, model.config.image_mean, model.config.image_std))
    indices = outlier_indices(features.query_BLV[:, 0], features.keys_BLNV[:, 0], 3)
    kept = torch.zeros(features.tokens_BNV.shape[:2]).scatter(1, indices, 1.0)[..., None]
    noise = torch.randn_like(features.tokens_BNV) * (1 - kept)
    with torch.no_grad():
        changed = decoding._contrast(replace(features, tokens_BNV=features.tokens_BNV + noise))
        shifted = decoding._contrast(replace(features, tokens_BNV=features.tokens_BNV + kept))
    assert torch.equal(changed, contrast)
    assert not torch.equal(shifted, contrast)
    together = answers(case, ASKED[:2], DAMRO)
    assert together == [answer for one in ASKED[:2] for answer in answers(case, [one], DAMRO)]


def test_more_outliers_than_anchors_and_tiles_of_any_number(assemble_tiny: Assemble) -> None:
    case = Case(assemble_tiny(
        {"_target_": "anchorformer.selectors.fastervlm.FasterVlmSelectorConfig", "num_anchors": 2},
        {"_target_": "anchorformer.connectors.mlp.MlpConfig"}, tiling={"grids": [[1, 2], [2, 1], [2, 2]]},
    ))  # fmt: skip
    asked = [ASKED[0], ASKED[1], ASKED[3]]
    config = replace(DAMRO, top_k=5)
    assert answers(case, asked, config) == [plainly(case, one, config, tokens_alone(case.model)) for one in asked]


def test_images_with_other_numbers_of_anchors_are_answered_together_as_alone(assemble_tiny: Assemble) -> None:
    mlp = {"_target_": "anchorformer.connectors.mlp.MlpConfig"}
    case = Case(assemble_tiny(TINY, mlp, tiling={"grids": [[1, 2], [2, 2]]}))
    decoding, asked = DAMRO.build(case.model), [ASKED[0], ASKED[1], ASKED[3]]
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    sights = [look(decoding, case.processor, images) for _, images in asked]
    assert len({count for each in sights for sight in each for count in sight.counts}) > 1
    inputs = case.processor.pad([
        case.processor.prompt(turns, images, token_counts=[sight.counts for sight in each])
        for (turns, images), each in zip(asked, sights, strict=True)
    ])  # fmt: skip
    sight = Sight.of([sight for each in sights for sight in each])
    assert sight is not None
    processors = decoding.logits_processors(inputs["input_ids"], inputs["attention_mask"], sight)
    together = case.model.generate(**inputs, image_embeds=sight.embeds, logits_processor=processors, **settings)
    stop = case.processor.stop_token_ids
    for row, (turns, images) in zip(together[:, inputs["input_ids"].shape[1] :].tolist(), asked, strict=True):
        alone = Seen(case.model, case.processor, images, decoding).generate(turns, do_sample=False, max_new_tokens=6)
        said = alone.tolist()
        assert said == row[: len(said)]
        assert len(said) == len(row) or said[-1] in stop


def test_the_tap_stands_beside_what_a_selector_reads(assemble_tiny: Assemble) -> None:
    target = "anchorformer.selectors.visionzip.VisionZipSelectorConfig"
    case = Case(assemble_tiny({"_target_": target, "num_anchors": 6}))
    tiles = case.processor.image_transform.tiles([ONE])
    for layer, taps in ((None, (-2,)), (2, (-2,)), (1, (-2, 1))):
        decoding = replace(DAMRO, layer=layer).build(case.model)
        assert decoding._tower.needs.qk == taps
        assert torch.equal(decoding.see(tiles).embeds, case.model.encode_images(tiles))
    assert case.model.vision_tower.needs.qk == (-2,), "the model's own tower is as it was"


def test_a_conversation_reads_its_contrast_anew_and_answers_alike(tiny: Case) -> None:
    decoding = DAMRO.build(tiny.model)
    seen = Seen(tiny.model, tiny.processor, [WIDE], decoding)
    turns: list[tuple[str, str]] = [("user", "<image>\nwhat color is the star?")]
    for question in ("and tea?", "how many objects are there?"):
        said = seen.generate(turns, do_sample=False, max_new_tokens=4)
        once = Seen(tiny.model, tiny.processor, [WIDE], decoding).generate(turns, do_sample=False, max_new_tokens=4)
        assert torch.equal(said, once)
        turns = [*turns, ("assistant", tiny.processor.tokenizer.decode(said)), ("user", question)]


def test_what_cannot_be_decoded_so_is_refused(tiny: Case, assemble_tiny: Assemble) -> None:
    with pytest.raises(UserError, match="one answer to each prompt"):
        answers(tiny, [ASKED[0]], DAMRO, num_beams=2)
    with pytest.raises(UserError, match="outlier tokens"):
        replace(DAMRO, top_k=17).build(tiny.model)
    with pytest.raises(UserError, match="cut before"):
        replace(DAMRO, layer=3).build(tiny.model)
    with pytest.raises(UserError, match="no such layer"):
        replace(DAMRO, layer=9).build(tiny.model)
    joint = Case(assemble_tiny(tiling={"grids": [[2, 2]], "select": "image"}))
    with pytest.raises(UserError, match="those of a tile"):
        DAMRO.build(joint.model)
    integration = {"_target_": "anchorformer.integrations.eram_v.EramVConfig", "layers": [1]}
    with pytest.raises(UserError, match="layers read every visual token"):
        DAMRO.build(Case(assemble_tiny(integration=integration)).model)
    decoding = DAMRO.build(tiny.model)
    tiles = tiny.processor.image_transform.tiles([ONE])
    with pytest.raises(UserError, match="feature cache"):
        decoding.see(tiles, None, tiny.model.vision_tower(torch.randn(1, 3, 28, 28)))


def test_a_tower_that_is_tapped_otherwise_shares_its_weights(tiny: Case) -> None:
    tower = tiny.model.vision_tower
    other = tower.retapped(VisionNeeds(layer=-2, received=True))
    own, shared = (dict(each.named_parameters()) for each in (tower, other))
    assert own.keys() == shared.keys()
    assert all(own[name] is shared[name] for name in own)
    pixels = torch.randn(2, 3, 28, 28)
    features = other(pixels)
    assert torch.equal(features.tokens_BNV, tower(pixels).tokens_BNV)
    assert features.received_BN is not None
    assert features.cls_scores_BHN is None
    assert tower(pixels).cls_scores_BHN is not None
    parked = [name for module in other.modules() for name in vars(module) if name.startswith("parked")]
    assert parked == ["parked_received"], "what the first one taps is not computed here"
    assert isinstance(other, VisionTower)


def test_the_terminal_decodes_as_it_is_told(tiny_folder: Path, tiny: Case) -> None:
    assert read_decoding("damro", "alpha=1.5", "top_k=3", "beta=0.05") == DAMRO
    assert read_decoding("damro", "layer=null") == DamroConfig()
    for words in (("damr",), ("damro", "alpha"), ("damro", "alpha=-1"), ("greedy", "alpha=1")):
        with pytest.raises(UserError, match="--decoding"):
            read_decoding(*words)
    opened = Opened(tiny_folder, tiny.model, tiny.processor)
    strong = replace(DAMRO, alpha=4.0).build(tiny.model)
    lines = ["what color is the star?", "and tea?"]
    told = "".join(chat(opened, WIDE, lines, max_new_tokens=4, decoding=strong))
    seen = Seen(tiny.model, tiny.processor, [WIDE], strong)
    first = "".join(Answer(tiny.model, tiny.processor, [("user", f"<image>\n{lines[0]}")], seen, max_new_tokens=4))
    assert told.startswith(f"{first}\n")
    assert told != "".join(chat(opened, WIDE, lines, max_new_tokens=4))
