"""The correlation selector against a plain statement of its rule, and what ragged numbers of anchors do not change."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from anchorformer.contracts import VisionFeatures
from anchorformer.decoding.greedy import Greedy
from anchorformer.errors import UserError
from anchorformer.fusion import fuse
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.seen import Seen, look
from anchorformer.selectors.correlation import CorrelationSelectorConfig
from anchorformer.weights import load_model
from tests.anchorformer.test_generation import ASKED, GREEDY, ONE, TWO, WIDE, Case, Watched
from tests.conftest import Assemble

PATCHES, WIDTH, IMAGES = 64, 24, 6
RULE = CorrelationSelectorConfig(low_layer=1, deep_layer=-1, tau=0.75, min_neighbours=3)
TINY = {
    "_target_": "anchorformer.selectors.correlation.CorrelationSelectorConfig", "low_layer": 1, "deep_layer": -1,
    "tau": 0.995, "min_neighbours": 2,
}  # fmt: skip
"""For the tiny tower of three blocks and 16 patches."""
TILING = {"grids": [[1, 2], [2, 2]]}


def features(seed: int = 0) -> VisionFeatures:
    """Images with more and more patches that are nearly copies of each other."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keys = draw(IMAGES, 2, PATCHES + 1, WIDTH)
    for image in range(IMAGES):
        copies = torch.randperm(PATCHES, generator=generator)[: image * PATCHES // (IMAGES - 1)] + 1
        keys[image, 0, copies] = draw(WIDTH) + 0.2 * draw(len(copies), WIDTH)
    query = draw(IMAGES, 2, WIDTH) * 2
    return VisionFeatures(
        draw(IMAGES, PATCHES + 1, 5), None, True, query_BLV=query, keys_BLNV=keys,
        image_key_B=torch.randint(2**32, (IMAGES,), generator=generator),
    )  # fmt: skip


def built(config: CorrelationSelectorConfig = RULE) -> Any:
    return config.build(PATCHES + 1, 4, True)


def sets(chosen_BN: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in chosen_BN]


def plainly(config: CorrelationSelectorConfig, seen: VisionFeatures, image: int) -> tuple[set[int], set[int], int]:
    """Sampled patches, outliers and how many were to be sampled: loops over Python's own floats."""
    assert seen.query_BLV is not None
    assert seen.keys_BLNV is not None
    assert seen.image_key_B is not None
    query = seen.query_BLV[image].double().tolist()
    keys = seen.keys_BLNV[image].double().tolist()

    def dot(a: list[float], b: list[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b, strict=True))

    low, deep = keys[0][1:], keys[1][1:]
    redundant = 0
    for one in range(PATCHES):
        near = 0
        for other in range(PATCHES):
            cosine = dot(low[one], low[other]) / math.sqrt(dot(low[one], low[one]) * dot(low[other], low[other]))
            near += other != one and cosine > config.tau
        redundant += near > config.min_neighbours
    number = max(1, PATCHES - redundant)

    def mixed(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    of_image = mixed(int(seen.image_key_B[image]) ^ config.seed * 0x9E3779B1 % 2**32)
    weights = [math.exp(dot(query[0], key) / math.sqrt(WIDTH)) for key in low]
    # Gumbel top-k in its other form: the smallest of exponential variates, each with its weight as its rate.
    times = [
        -math.log(((mixed(of_image ^ mixed(patch + 1)) >> 9) + 0.5) / 2**23) / weight
        for patch, weight in enumerate(weights)
    ]
    sampled = sorted(range(PATCHES), key=times.__getitem__)[:number]
    raw = [math.exp(dot(query[1], key) / math.sqrt(WIDTH)) for key in deep]
    attention = [value / math.fsum(raw) for value in raw]
    first, _, third = statistics.quantiles(attention, n=4, method="inclusive")
    border = third + config.iqr_factor * (third - first)
    outliers = {patch + 1 for patch, value in enumerate(attention) if value > border}
    return {patch + 1 for patch in sampled}, outliers, number


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("changes", [{}, {"seed": 7}, {"min_neighbours": 0}, {"iqr_factor": 0.5}, {"tau": 0.2}])
def test_the_rule_equals_a_plain_statement_of_it(changes: dict[str, Any], seed: int) -> None:
    config, seen = replace(RULE, **changes), features(seed)
    found = sets(built(config).choose(seen))
    numbers = set()
    for image in range(IMAGES):
        sampled, outliers, number = plainly(config, seen, image)
        assert found[image] == sampled | outliers
        assert len(sampled) == number
        numbers.add(number)
    assert len(numbers) > 2


def test_images_have_other_numbers_of_anchors_and_rows_end_with_their_last_one() -> None:
    seen, selector = features(), built()
    anchors, expected = selector(seen), sets(selector.choose(seen))
    assert anchors.sizes == tuple(map(len, expected))
    assert len(set(anchors.sizes)) > 2
    assert min(anchors.sizes) >= 1
    assert anchors.indices_BT.shape[1] == max(anchors.sizes)
    for number, (row, size, own) in enumerate(zip(anchors.indices_BT, anchors.sizes, expected, strict=True)):
        assert row[:size].tolist() == sorted(own)
        assert set(row[size:].tolist()) <= {max(own)}
        assert 0 not in own, "[CLS] is dropped"
        assert torch.equal(anchors.tokens_BTV[number], seen.tokens_BNV[number, row])


def test_an_image_of_copies_alone_keeps_one_patch_and_its_outliers() -> None:
    seen = features()
    alike = seen.keys_BLNV.clone()  # type: ignore[union-attr]
    alike[:, 0] = alike[:1, :1, 1:2]
    flat = replace(seen, keys_BLNV=alike.index_fill(1, torch.tensor([1]), 0.0))
    assert built()(flat).sizes == (1,) * IMAGES


def test_images_do_not_mix_and_there_may_be_none() -> None:
    seen, selector = features(), built()
    together = selector.choose(seen)

    def part(rows: slice) -> VisionFeatures:
        return seen.map(lambda tensor: tensor[rows])

    for image in range(IMAGES):
        assert torch.equal(selector.choose(part(slice(image, image + 1))), together[image : image + 1])
    none = selector(part(slice(0, 0)))
    assert none.sizes == ()
    assert none.tokens_BTV.shape == (0, 0, 5)


def test_shuffled_patches_are_followed_in_number_and_as_outliers() -> None:
    """Draws belong to places, so which of them are sampled is not: how many, and the deep layer's, are."""
    seen = features()
    assert seen.keys_BLNV is not None
    order = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(PATCHES) + 1])
    shuffled = replace(seen, keys_BLNV=seen.keys_BLNV[:, :, order])
    for image in range(IMAGES):
        _, outliers, number = plainly(RULE, seen, image)
        _, others, same = plainly(RULE, shuffled, image)
        assert (number, outliers) == (same, {int(order[patch]) for patch in others})
        assert others <= sets(built().choose(shuffled))[image]


def test_the_seed_draws_other_patches_and_likely_ones_more_often() -> None:
    seen = features()
    numbers, hits = set(), torch.zeros(PATCHES)
    for seed in range(200):
        chosen = built(replace(RULE, seed=seed, iqr_factor=1e6)).choose(seen)[:, 1:]
        numbers.add(tuple(chosen.sum(1).tolist()))
        hits += chosen[3]
    assert len(numbers) == 1
    assert torch.equal(built().choose(seen), built().choose(features()))
    logits = seen.keys_BLNV[3, 0, 1:] @ seen.query_BLV[3, 0]  # type: ignore[index]
    ranks = torch.stack([logits.argsort().argsort(), hits.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.9


def test_a_choice_that_was_made_is_kept() -> None:
    seen, selector = features(), built()
    decided = selector.decided(seen)
    assert decided.keys_BLNV is None
    kept = replace(decided, num_chosen=tuple(decided.chosen_BN.sum(1).tolist()))
    for known in (decided, kept):
        assert torch.equal(selector(known).indices_BT, selector(seen).indices_BT)
        assert selector(known).sizes == selector(seen).sizes
    blank = kept.blank(2)
    assert selector(blank).sizes == (1, 1)


@pytest.mark.slow
def test_choosing_is_one_graph() -> None:
    """Only the sizes of a choice are waited for, and those are known where a cache is read."""
    seen, selector = features(), built()
    torch._dynamo.reset()
    compiled = torch.compile(lambda: selector.choose(seen), fullgraph=True, backend="eager")
    assert torch.equal(compiled(), selector.choose(seen))


def test_layers_have_to_differ(assemble_tiny: Assemble) -> None:
    with pytest.raises(UserError, match="one layer twice"):
        assemble_tiny(selector=TINY | {"deep_layer": 1})


def test_who_cannot_have_other_numbers_says_so(assemble_tiny: Assemble) -> None:
    resampler = {"_target_": "anchorformer.connectors.resampler.ResamplerConfig", "num_queries": 4, "depth": 1}
    with pytest.raises(UserError, match="'resampler' does not map each anchor"):
        assemble_tiny(selector=TINY, connector=resampler)
    with pytest.raises(UserError, match="cannot look at all tiles"):
        assemble_tiny(selector=TINY, tiling=TILING | {"select": "image"})


@pytest.fixture(scope="module", params=["square", "tiles"])
def case(request: pytest.FixtureRequest, assemble_tiny: Assemble) -> Case:
    return Case(assemble_tiny(selector=TINY, tiling=TILING if request.param == "tiles" else None))


def inputs_of(case: Case, asked: Any) -> dict[str, Any]:
    looks = look(Greedy(case.model), case.processor, [image for _, images in asked for image in images])
    return dict(
        case.processor(
            [images for _, images in asked], conversations=[turns for turns, _ in asked],
            token_counts=[each.counts for each in looks],
        )
    )  # fmt: skip


def test_a_model_folder_remembers_that_numbers_differ(case: Case) -> None:
    assert case.model.num_image_tokens is None
    assert case.processor.num_image_tokens is None
    images = [ONE, TWO, WIDE, Image.new("RGB", (60, 60))]
    looks, transform = look(Greedy(case.model), case.processor, images), case.processor.image_transform
    assert len({count for each in looks for count in each.counts}) > 1
    assert [len(each.counts) for each in looks] == [transform.count(image.size) for image in images]
    assert all(len(each.embeds) == sum(each.counts) for each in looks)


def test_a_batch_is_answered_as_its_rows_are(case: Case) -> None:
    """From pixels, from embeddings, with beams, and by a `Seen` that goes on."""

    def answers(asked: Any, **changes: Any) -> list[list[int]]:
        inputs = inputs_of(case, asked) | {**GREEDY, "eos_token_id": None, **changes}
        return [row[inputs["input_ids"].shape[1] :].tolist() for row in case.model.generate(**inputs)]

    together = answers(ASKED)
    assert together == [answer for one in ASKED for answer in answers([one])]
    assert len(set(map(tuple, together))) > 1
    seen = Seen(case.model, case.processor, ASKED[1][1])
    assert (
        seen.generate(ASKED[1][0], **GREEDY, suppress_tokens=[2]).tolist()
        == answers([ASKED[1]], suppress_tokens=[2])[0]
    )
    inputs = inputs_of(case, [ASKED[1]])
    for name in ("pixel_values", "tile_counts"):
        inputs.pop(name, None)
    beams = {"num_beams": 2, "num_return_sequences": 2}
    found = case.model.generate(**inputs, image_embeds=seen.image_embeds, **GREEDY, eos_token_id=None, **beams)
    assert found[:, inputs["input_ids"].shape[1] :].tolist() == answers([ASKED[1]], **beams)


def test_what_was_read_is_not_read_again(case: Case) -> None:
    """Also where a prompt differs inside of an image: none is read half."""
    seen = Seen(case.model, case.processor, [TWO, WIDE])
    first = [("user", "<image><image>\nwhat color is the star?")]
    for turns in (
        first,
        [("user", "<image> <image>\nhow many?")],
        [*first, ("assistant", "red"), ("user", "and tea?")],
    ):
        fresh = Seen(case.model, case.processor, [TWO, WIDE])
        assert seen.generate(turns, **GREEDY).equal(fresh.generate(turns, **GREEDY))


def test_no_part_of_a_view_is_kept(case: Case) -> None:
    """Asked the same again, a prompt that ends with its images is read from where the last view begins."""
    processor = case.processor.with_template("plain")
    seen, watched = Seen(case.model, processor, [TWO, WIDE]), Watched(case)
    for _ in range(2):
        watched.read.clear()
        seen.generate([("user", "<image><image>")], do_sample=False, max_new_tokens=2)
    watched.close()
    assert watched.read[0] == seen.sights[-1].counts[-1] > 1


def test_flat_and_padded_forms_agree(case: Case) -> None:
    """Samples of other numbers of embeddings, packed into one row and padded into several; gradients flow."""
    from data.collate import collate  # the form that training packs

    asked = [(turns, images) for turns, images in ASKED if turns[-1][0] == "user"]
    looks = [look(Greedy(case.model), case.processor, images) for _, images in asked]
    examples = [
        case.processor.encode(
            [*turns, ("assistant", "red 3")], images, sample_id=str(number),
            token_counts=[each.counts for each in own],
        )
        for number, ((turns, images), own) in enumerate(zip(asked, looks, strict=True))
    ]  # fmt: skip
    batch = collate(examples)
    assert batch.token_counts == tuple(count for own in looks for each in own for count in each.counts)
    flat = case.model(
        input_ids=batch.input_ids_S[None], position_ids=batch.position_ids_S[None], cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen, pixel_values=batch.tiles_B3HW, tile_counts=batch.tile_counts,
    ).logits[0]  # fmt: skip
    padded = case.processor.pad([example.input_ids_S for example in examples], side="right")
    rows = case.model(**padded, pixel_values=batch.tiles_B3HW, tile_counts=batch.tile_counts).logits
    expected = torch.cat([row[: len(example.input_ids_S)] for row, example in zip(rows, examples, strict=True)])
    torch.testing.assert_close(flat, expected, atol=1e-5, rtol=1e-5)


def test_padded_anchors_leave_no_trace(case: Case) -> None:
    """An image's embeddings and the connector's gradients are those of the image alone, whatever stands beside it."""
    model: AnchorFormerForConditionalGeneration = case.model
    transform = case.processor.image_transform
    alone = []
    for image in (ONE, Image.new("RGB", (60, 60))):
        rows, _ = model.encode_views(transform.tiles([image]), [transform.count(image.size)])
        alone.append(rows)
    weights = [torch.randn_like(rows) for rows in alone]
    parameters = [parameter for parameter in model.connector.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(sum((r * w).sum() for r, w in zip(alone, weights, strict=True)), parameters)
    images = [ONE, Image.new("RGB", (60, 60))]
    rows, counts = model.encode_views(transform.tiles(images), [transform.count(image.size) for image in images])
    assert len(set(counts)) > 1
    torch.testing.assert_close(rows, torch.cat(alone), atol=1e-6, rtol=1e-5)
    found = torch.autograd.grad((rows * torch.cat(weights)).sum(), parameters)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_counts_that_are_missing_or_of_other_images_are_refused(case: Case) -> None:
    turns, images = ASKED[0]
    with pytest.raises(UserError, match="not known") as caught:
        case.processor([images], conversations=[turns])
    assert "look" in caught.value.remedy
    with pytest.raises(UserError, match="not known"):
        case.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "image": ONE}]}], tokenize=True, add_generation_prompt=True
        )
    (own,) = look(Greedy(case.model), case.processor, images)
    for wrong in ([], [own.counts, own.counts], [(*own.counts, 3)], [(0,) * len(own.counts)]):
        with pytest.raises(UserError, match="not of these images"):
            case.processor.prompt(turns, images, token_counts=wrong)
    inputs = inputs_of(case, [ASKED[0]])
    with pytest.raises(UserError, match=r"\d+ placeholders for \d+ embeddings"):
        case.model(**inputs | {"image_embeds": own.embeds[:-1], "pixel_values": None})


def test_a_fixed_processor_compares_what_it_is_told(tiny_folder: Any) -> None:
    made = Case(tiny_folder)
    (own,) = look(Greedy(made.model), made.processor, [ONE])
    told = made.processor.prompt(ASKED[0][0], [ONE], token_counts=[own.counts])
    assert torch.equal(told, made.processor.prompt(ASKED[0][0], [ONE]))
    with pytest.raises(UserError, match="not of these images") as caught:
        made.processor.prompt(ASKED[0][0], [ONE], token_counts=[(8,)])
    assert "9 each" in caught.value.expected


def test_embeddings_end_to_end_take_their_places() -> None:
    ids = torch.tensor([[1, 9, 9, 2, 9], [9, 3, 4, 9, 9]])
    rows = torch.arange(12.0).view(6, 2)
    fused = fuse(torch.zeros(2, 5, 2), ids, rows, 9)
    assert torch.equal(fused[ids == 9], rows)
    assert torch.equal(fused, fuse(torch.zeros(2, 5, 2), ids, rows.view(2, 3, 2), 9))


def test_saved_and_loaded_it_is_the_same(case: Case, tmp_path: Any, assemble_tiny: Assemble) -> None:
    case.processor.save_pretrained(tmp_path)
    again = AnchorFormerProcessor.from_pretrained(tmp_path)
    assert again.needs_token_counts
    assert again.image_transform == case.processor.image_transform
    folder = assemble_tiny(selector=TINY)
    twice = [
        look(Greedy(load_model(folder, torch.float32).eval()), Case(folder).processor, [ONE, WIDE]) for _ in range(2)
    ]
    for one, other in zip(*twice, strict=True):
        assert one.counts == other.counts
        assert torch.equal(one.embeds, other.embeds)
