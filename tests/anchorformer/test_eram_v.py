"""eRAM-V's integration: closed it changes no bit, open all forms agree, and no position sees what comes later."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.connector_folder import attach, export_connector
from anchorformer.errors import UserError
from anchorformer.integrations.eram_v import middle_layers
from anchorformer.kernels.rope import rotate
from anchorformer.model_folder import read_index
from anchorformer.modeling import AnchorFormerForConditionalGeneration
from anchorformer.seen import Seen
from anchorformer.weights import check_folder, load_model
from tests.anchorformer.test_generation import ASKED, GREEDY, ONE, TWO, WIDE, Case, check_known_embeddings
from tests.anchorformer.test_modeling import Sample, assert_close, make_samples, run_alone, run_flat
from tests.conftest import ANCHOR, CONNECTOR, Assemble
from tests.test_every_combination import CONNECTORS

TARGET = "anchorformer.integrations.eram_v.EramVConfig"
AVERAGE = {"_target_": "anchorformer.selectors.average.AverageSelectorConfig", "num_anchors": 5, "layer": -2}
MLP = {"_target_": "anchorformer.connectors.mlp.MlpConfig"}
LEARNED = {"_target_": "anchorformer.connectors.resampler.ResamplerConfig", "num_queries": 4, "depth": 1}
TEXT = {
    "vocab_size": 400, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
TEXTS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "llama_biased": LlamaConfig,
}  # fmt: skip


def integration(**changes: Any) -> dict[str, Any]:
    return {"_target_": TARGET, "layers": [2, 3], **changes}


def build(
    with_integration: dict[str, Any] | None, text: str = "llama", connector: dict[str, Any] = MLP, **changes: Any
) -> AnchorFormerForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
    )
    values = {**TEXT, "attention_bias": True} if text == "llama_biased" else TEXT
    config = AnchorFormerConfig(
        vision_config=vision, text_config=TEXTS[text](**values), selector=AVERAGE, connector=connector,
        image_token_id=399, integration=with_integration, **changes,
    )  # fmt: skip
    model = AnchorFormerForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            nn.init.normal_(parameter)  # published ones are not 0 either
    return model


def opened(model: AnchorFormerForConditionalGeneration) -> AnchorFormerForConditionalGeneration:
    """The same model with all gates open, some wider than others."""
    gates = [value for name, value in model.named_parameters() if name.endswith("value_L")]
    assert gates
    with torch.no_grad():
        for number, gate in enumerate(gates, 1):
            gate.copy_(torch.linspace(0.4, 0.9, len(gate)) * number)
    return model


def twins(text: str = "llama", **changes: Any) -> tuple[Any, Any]:
    """A model without integration, and one with closed gates and otherwise the same weights."""
    plain, integrated = build(None, text), build(integration(**changes), text)
    fresh = integrated.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert fresh
    assert all(name.startswith("integration.") for name in fresh)
    return plain, integrated


@pytest.mark.parametrize(("text", "dtype"), [*((text, torch.float32) for text in TEXTS), ("llama", torch.bfloat16)])
@torch.no_grad()
def test_closed_it_changes_no_bit(text: str, dtype: torch.dtype) -> None:
    plain, integrated = (model.to(dtype) for model in twins(text))
    samples = make_samples(plain)
    assert all(map(torch.equal, run_flat(plain, samples), run_flat(integrated, samples)))
    assert all(torch.equal(run_alone(plain, sample), run_alone(integrated, sample)) for sample in samples)


@pytest.mark.parametrize("inject", [True, False])
@pytest.mark.parametrize("text", TEXTS)
@torch.no_grad()
def test_open_all_forms_agree(text: str, inject: bool) -> None:
    plain, integrated = twins(text, inject=inject)
    samples = make_samples(opened(integrated))
    flat = run_flat(integrated, samples)
    longest = max(len(ids) for ids, _ in samples)
    mask = torch.stack([(torch.arange(longest) >= longest - len(ids)).long() for ids, _ in samples])
    padded = integrated(
        input_ids=torch.stack([nn.functional.pad(ids, (longest - len(ids), 0)) for ids, _ in samples]),
        attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        pixel_values=torch.cat([pixels for _, pixels in samples]),
    ).logits  # fmt: skip
    for index, (ids, pixels) in enumerate(samples):
        alone, without = run_alone(integrated, (ids, pixels)), run_alone(plain, (ids, pixels))
        assert_close(flat[index], alone)
        assert_close(padded[index, longest - len(ids) :], alone)
        assert torch.equal(alone, without) == (len(pixels) == 0), "an image is heard, and only where there is one"


@torch.no_grad()
def test_no_position_depends_on_what_comes_later_or_on_another_sample() -> None:
    model = opened(build(integration()))
    ids, pixels = make_samples(model)[1]  # text, image, text, image, text
    image = model.num_image_tokens
    before = run_alone(model, (ids, pixels))
    other = pixels.clone()
    other[1] = 255 - other[1]
    after = run_alone(model, (ids, other))
    begins = 3 + image + 2
    assert torch.equal(before[:begins], after[:begins])
    assert not torch.isclose(before[begins:], after[begins:]).all(-1).any()
    assert_close(run_alone(model, (ids[:begins], pixels[:1])), before[:begins])

    samples = make_samples(model)
    changed = [*samples[:1], (ids, other), *samples[2:]]
    for index, (one, two) in enumerate(zip(run_flat(model, samples), run_flat(model, changed), strict=True)):
        assert torch.equal(one, two) == (index != 1)


def stated(model: Any, sample: Sample) -> Tensor:
    """The logits of one sample, position by position and head by head, from the weights alone."""
    ids, pixels = sample
    features = model.vision_tower((pixels / 255 - torch.tensor(model.config.image_mean)[:, None, None])
                                  / torch.tensor(model.config.image_std)[:, None, None])  # fmt: skip
    anchors, own = model.selector(features), model.integration
    starts, mlp = [], own.projector
    hidden = model.get_input_embeddings()(ids).clone()
    direct = torch.zeros_like(hidden)
    places = (ids == model.image_token_id).nonzero()[:, 0].view(len(pixels), -1)
    for view, where in enumerate(places):
        starts.append(int(where[0]))
        hidden[where] = model.connector.projector(anchors.tokens_BTV[view])
        direct[where] = mlp(anchors.tokens_BTV[view])
    decoder = model.language_model.model
    cos, sin = decoder.rotary_emb(hidden[None], torch.arange(len(ids))[None])

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 12)).transpose(0, 1)

    for number, layer in enumerate(decoder.layers, 1):
        place = own.layers.index(number) if number in own.layers else None
        if place is not None:
            hidden = hidden + own.inject_gate.value_L[place].tanh() * direct
        normed, attention = layer.input_layernorm(hidden), layer.self_attn
        query, key, value = (heads(part(normed)) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        turned, turned_key = (x[0] for x in rotate(query[None], key[None], cos, sin))
        rows = []
        for position in range(len(ids)):
            out = []
            for head in range(4):
                scores = turned[head, position] @ turned_key[head // 2, : position + 1].T / 12**0.5
                out.append(scores.softmax(-1) @ value[head // 2, : position + 1])
            row = attention.o_proj(torch.cat(out))
            seen = [view for view, start in enumerate(starts) if start <= position]
            if place is not None and seen:
                fine = layer.input_layernorm(mlp(features.tokens_BNV[seen].flatten(0, 1)))
                fine_key, fine_value = heads(attention.k_proj(fine)), heads(attention.v_proj(fine))
                out = [
                    (query[head, position] @ fine_key[head // 2].T / 12**0.5).softmax(-1) @ fine_value[head // 2]
                    for head in range(4)
                ]
                row = row + own.cross_gate.value_L[place].tanh() * attention.o_proj(torch.cat(out))
            rows.append(row)
        hidden = hidden + torch.stack(rows)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.language_model.lm_head(decoder.norm(hidden))


@torch.no_grad()
def test_it_is_what_the_page_says() -> None:
    model = opened(build(integration()))
    for sample in (sample for sample in make_samples(model) if len(sample[1])):
        assert_close(run_alone(model, sample), stated(model, sample))


def loss_of(model: Any, samples: list[Sample]) -> Tensor:
    return torch.stack([logits.float().logsumexp(-1).mean() for logits in run_flat(model, samples)]).sum()


def test_text_alone_takes_every_parameter_along_and_adds_nothing() -> None:
    plain, integrated = twins()
    opened(integrated).train()
    texts = [sample for sample in make_samples(plain) if len(sample[1]) == 0]
    assert all(map(torch.equal, run_flat(plain.train(), texts), run_flat(integrated, texts)))
    loss_of(integrated, texts).backward()
    for name, parameter in integrated.integration.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_every_new_parameter_learns_once_the_gates_are_open() -> None:
    model = build(integration()).train()
    for is_open in (False, True):
        loss_of(opened(model) if is_open else model, make_samples(model)).backward()
        for name, parameter in model.integration.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            assert bool(parameter.grad.any()) == (is_open or "gate" in name), name
        model.zero_grad()


def test_layers_that_are_computed_again_give_the_same_gradients() -> None:
    model = opened(build(integration())).train()
    gradients = []
    for again in (False, True):
        if again:
            model.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss_of(model, make_samples(model)).backward()
        gradients.append(
            {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        )
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


@torch.no_grad()
def test_a_copy_has_hooks_of_its_own_and_nothing_stays_behind() -> None:
    model = opened(build(integration()))
    samples = make_samples(model)
    before = run_flat(model, samples)
    other = copy.deepcopy(model)
    for value in other.parameters():
        value.mul_(1.5)
    assert not torch.equal(run_flat(other, samples)[0], before[0])
    run_flat(model, make_samples(model, seed=1))
    assert all(map(torch.equal, run_flat(model, samples), before))


@pytest.fixture(scope="module", params=["one", pytest.param("tiles", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest, assemble_tiny: Assemble) -> Case:
    tiling = {"grids": [[1, 2], [2, 1], [2, 2]]} if request.param == "tiles" else None
    made = Case(assemble_tiny(tiling=tiling, integration=integration(layers=[1, 2])))
    opened(made.model)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("connector", CONNECTORS)
def test_it_goes_with_every_connector(connector: str) -> None:
    """With the direct features where there is one embedding per anchor, else with the visual tokens alone."""
    spec, follows = CONNECTORS[connector], connector in ("anchor_former", "identity", "mlp")
    if not follows:
        with pytest.raises(UserError, match="one embedding per anchor"):
            build(integration(), connector=spec)
    plain, integrated = build(None, connector=spec), build(integration(inject=follows), connector=spec)
    integrated.load_state_dict(plain.state_dict(), strict=False)
    samples = make_samples(plain)
    with torch.no_grad():
        before = run_flat(plain, samples)
        assert all(map(torch.equal, before, run_flat(integrated, samples)))
        opened(integrated)
        assert not torch.equal(run_flat(integrated, samples)[0], before[0])
        assert_close(run_flat(integrated, samples)[1], run_alone(integrated, samples[1]))


@pytest.mark.slow
def test_a_compiled_language_model_says_the_same() -> None:
    model = opened(build(integration()))
    samples = make_samples(model)
    with torch.no_grad():
        before = run_flat(model, samples)
    model.language_model.compile(backend="eager")
    with torch.no_grad():
        for one, two in zip(before, run_flat(model, samples), strict=True):
            assert_close(two, one)


def plain_of(case: Case) -> list[list[int]]:
    model: Any = copy.deepcopy(case.model)
    for gate in (model.integration.cross_gate, model.integration.inject_gate):
        nn.init.zeros_(gate.value_L)
    other = copy.copy(case)
    other.model = model
    return other.generate(ASKED)


@torch.no_grad()
def step_by_step(case: Case, turns: Any, images: Any) -> list[int]:
    inputs = case.processor([images], conversations=[turns])
    ids, new = inputs.pop("input_ids"), list[int]()
    for _ in range(GREEDY["max_new_tokens"]):
        inputs["attention_mask"] = torch.ones_like(ids)
        logits = case.model(input_ids=ids, **inputs).logits[0, -1]
        logits[case.model.image_token_id] = -torch.inf
        new.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
    return new


def test_every_way_to_an_answer_says_the_same(case: Case) -> None:
    together = case.generate(ASKED)
    assert together == [step_by_step(case, *one) for one in ASKED]
    assert together == case.generate(ASKED, use_cache=False)
    assert together == case.alone(ASKED)
    assert together != plain_of(case), "the visual tokens are heard"


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_see_the_images_of_their_row(case: Case, settings: dict[str, Any]) -> None:
    assert case.generate(ASKED, **settings) == case.alone(ASKED, **settings)
    assert case.generate(ASKED, **settings) == case.generate(ASKED, **settings, use_cache=False)


def test_what_was_seen_is_asked_about_again(case: Case) -> None:
    """The first image lies in the cache when the second question is read, with all of its visual tokens."""
    seen = Seen(case.model, case.processor, [TWO, WIDE])
    talk = [("user", "<image> <image>\nwhat?")]
    for said in ("how many stars are there?", "and tea?"):
        answer = seen.generate(talk, **{**GREEDY, "max_new_tokens": 4}).tolist()
        assert (
            answer
            == case.generate([(talk, [TWO, WIDE])], max_new_tokens=4, eos_token_id=case.processor.stop_token_ids)[0]
        )
        talk = [*talk, ("assistant", "red"), ("user", said)]
    nothing = Seen(case.model, case.processor, [])
    asked = ASKED[2][0]
    assert (
        nothing.generate(asked, **GREEDY).tolist()
        == case.generate([(asked, [])], eos_token_id=case.processor.stop_token_ids)[0]
    )


def test_known_embeddings_answer_as_their_images_do(case: Case) -> None:
    check_known_embeddings(case)


@torch.no_grad()
def test_a_cache_without_its_images_is_refused(case: Case) -> None:
    inputs = case.processor([[ONE]], conversations=[ASKED[0][0]])
    cache = DynamicCache()
    case.model(**inputs, past_key_values=cache, use_cache=True)
    more = case.processor([[TWO]], conversations=[ASKED[0][0]])
    more["attention_mask"] = torch.ones(1, cache.get_seq_length() + more["input_ids"].shape[1], dtype=torch.int64)
    for given in ({"input_ids": torch.tensor([[7]])}, more):
        with pytest.raises(UserError, match="in the cache"):
            case.model(**given, past_key_values=cache, use_cache=True)


def test_a_folder_holds_it_in_a_file_of_its_own(assemble_tiny: Assemble, tiny_folder: Path, tmp_path: Path) -> None:
    asked = integration(layers=[1, 2], hidden_width=20)
    folder = assemble_tiny(integration=asked)
    files = {name.split(".")[0]: file for name, file in read_index(folder).items()}
    assert files["integration"] == "integration.safetensors"
    assert json.loads((tiny_folder / "config.json").read_text())["integration"] is None
    check_folder(folder, ANCHOR, CONNECTOR, integration=asked)
    for place, wanted in ((folder, None), (tiny_folder, asked), (folder, integration(layers=[2]))):
        with pytest.raises(UserError, match=r"integration of .* is not the one"):
            check_folder(place, ANCHOR, CONNECTOR, integration=wanted)

    model = opened(load_model(folder, torch.float32).eval())
    assert tuple(model.integration.projector[0].weight.shape) == (20, 32)  # type: ignore[index,union-attr]
    model.save_pretrained(tmp_path / "saved")
    again = AnchorFormerForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    samples = make_samples(model)
    assert all(map(torch.equal, run_flat(model, samples), run_flat(again, samples)))


def test_it_travels_with_its_connector(assemble_tiny: Assemble, tiny_backbones: Path, tmp_path: Path) -> None:
    folder = assemble_tiny(integration=integration(layers=[1, 2]))
    bases = {"vision_tower": str(tiny_backbones / "clip"), "language_model": str(tiny_backbones / "llama")}
    handed = export_connector(folder, tmp_path / "connector", torch.float32, bases, "card")
    whole = attach(handed, tmp_path / "whole")
    check_folder(whole, ANCHOR, CONNECTOR, integration=integration(layers=[1, 2]), every_hash=True)
    first, second = (load_model(each, torch.float32).state_dict() for each in (folder, whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_it_does_not_go_with_is_refused() -> None:
    TEXTS["qwen3"] = Qwen3Config
    try:
        with pytest.raises(UserError, match="llama, mistral, qwen2"):
            build(integration(), "qwen3")
    finally:
        del TEXTS["qwen3"]
    for layers in ([], [3, 2], [2, 2], [4, 5], [0]):
        with pytest.raises(UserError, match="layers"):
            build(integration(layers=layers))
    with pytest.raises(UserError, match="4 embeddings"):
        build(integration(), connector=LEARNED)
    build(integration(inject=False), connector=LEARNED)
    with pytest.raises(UserError, match="views of one size"):
        build(integration(), tiling={"grids": [[1, 2], [2, 2]], "select": "image"})
    build(integration(), tiling={"grids": [[2, 2]], "select": "image"})


def test_the_middle_of_32_layers() -> None:
    assert middle_layers(32) == [*range(8, 21)]
    assert all(1 <= number <= count for count in range(1, 9) for number in middle_layers(count))
