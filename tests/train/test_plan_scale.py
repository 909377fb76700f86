"""Steps on many cards: times from messages, what is hidden, what does not scale; and the dealing of real lengths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anchorformer.errors import UserError
from tests.train.test_presets import composed
from train.choices import Part
from train.plan.cards import named_card
from train.plan.dealing import Lengths, deal, mean, read_lengths
from train.plan.fit import layout_of
from train.plan.flops import Work
from train.plan.links import REACHED, Group
from train.plan.scale import Assumed, Step, last_that_scales, on_nodes, step_on
from train.plan.shapes import read_shapes
from train.plan.traffic import Phase, Way, step_traffic
from train.verbs import plan

LENGTHS = Path(__file__).parents[2] / "bench" / "lengths.json"
TRAINS = (Part.connector, Part.language_model)
A100 = named_card("a100-80gb")


def work() -> Work:
    return Work(positions=335, squares=335**2, supervised=110, images=1)


def step(*more: str, nodes: int = 1, hardware: str = "a100x8", grows: bool = True, **assumed: Any) -> Step:
    config = on_nodes(composed(hardware, "paper_7b", "finetune", *more), nodes, grows=grows)
    assert config is not None
    return step_on(config, read_shapes(config), A100, Assumed(**{"mfu": 0.4, "work": work(), **assumed}))


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    node = Group(ranks=8, nodes=1, link=300, network=25)
    assert node.ring_seconds(8e9, 0)[1] == pytest.approx(7e9 / (REACHED * 300e9))
    assert Group(ranks=16, nodes=2, link=300, network=25).ring_seconds(8e9, 0)[1] == pytest.approx(
        7.5e9 / (REACHED * 25e9)
    )
    assert Group(ranks=16, nodes=2, link=300, network=2500).ring_seconds(8e9, 0)[1] < 8e9 / (REACHED * 300e9)
    assert Group(ranks=1, nodes=1, link=300, network=25).ring_seconds(8e9, 9) == (0.0, 0.0)
    slow, fast = (Group(ranks=16, nodes=count, link=300, network=25).ring_seconds(0, 2)[0] for count in (16, 2))
    assert slow > fast > 0, "a hop over the network takes longer"


def test_no_message_is_on_its_way_in_one_rank() -> None:
    config = composed("a100x1", "paper_7b", "align")
    made = step_on(config, read_shapes(config), A100, Assumed(mfu=0.4, work=work()))
    assert (made.latency, made.sending, made.waiting) == (0, 0, 0)
    assert not made.traffic
    assert made.rate == pytest.approx(made.global_batch / (made.compute + made.update))


@pytest.mark.parametrize("more", [(), ("zero=zero3",), ("zero=zero1",)])
def test_more_nodes_and_slower_ones_never_help_a_card(more: tuple[str, ...]) -> None:
    steps = [step(*more, nodes=nodes) for nodes in (1, 2, 8, 64)]
    beside = [made.seconds - made.update for made in steps]  # which more ranks share
    assert beside == sorted(beside)
    assert step(*more, nodes=8, network=10).rate < step(*more, nodes=8).rate
    assert step(*more, "zero.overlap_comm=false", nodes=8).seconds >= step(*more, nodes=8).seconds


def test_hpz_and_quantizing_help_where_the_network_is_slow() -> None:
    plain, hpz, plus = (
        step(f"zero={zero}", nodes=8, hardware="a100x8_2nodes", network=5)
        for zero in ("zero3", "zero3_hpz", "zero3_plus")
    )
    assert plain.seconds > hpz.seconds > plus.seconds
    assert sum(message.size for message in hpz.traffic if message.way is Way.all) < sum(
        message.size for message in plain.traffic
    )


def test_offloading_costs_the_host_s_links_and_cores() -> None:
    plain, cpu = step("zero=zero3"), step("zero=zero3_offload")
    nvme = step("zero=zero3_nvme", "zero.nvme_path=/n")
    assert cpu.update > 10 * plain.update
    assert {message.way for message in plain.traffic} == {Way.all}
    assert {message.way for message in cpu.traffic} == {Way.all, Way.host}
    assert {message.way for message in nvme.traffic} == {Way.all, Way.host, Way.disk}
    assert plain.seconds < cpu.seconds < nvme.seconds


def test_the_counted_sizes_of_a_7b() -> None:
    """By hand: 6.82e9 trained values in bf16, three micro-batches."""
    config = composed("a100x8", "paper_7b", "finetune")
    shapes = read_shapes(config)
    trained = 2 * (shapes.parameters[Part.connector] + shapes.parameters[Part.language_model])
    layout = layout_of(config, checkpointing=False)
    sizes = {
        stage: sum(message.size for message in step_traffic(shapes, TRAINS, replace(layout, zero=stage), 3))
        for stage in range(4)
    }
    assert sizes[0] == 2 * trained
    assert sizes[1] == 3 * trained
    assert sizes[2] == (2 * 3 + 1) * trained
    total = 2 * sum(shapes.parameters.values())
    assert sizes[3] == pytest.approx(3 * (total + (trained - 1e9) + trained))
    hidden = {message.phase for message in step_traffic(shapes, TRAINS, layout, 3) if not message.hides}
    assert hidden == {Phase.after}


def test_where_it_stops_and_why() -> None:
    config = composed("a100x8", "paper_7b", "finetune")
    shapes, assumed = read_shapes(config), Assumed(mfu=0.4, work=work())
    nodes, why = last_that_scales(config, shapes, assumed, grows=False)
    assert nodes <= 16
    assert "cannot be dealt" in why or "%" in why
    further, reason = last_that_scales(config, shapes, assumed, grows=True)
    assert further > nodes
    assert "latency" in reason
    assert on_nodes(config, 64, grows=False) is None, "128 samples for 512 cards"
    grown = on_nodes(config, 64, grows=True)
    assert grown is not None
    assert grown.stage.global_batch == 8192


def test_waiting_is_what_the_dealing_says() -> None:
    lengths = read_lengths(LENGTHS)
    config = composed("a100x8_8nodes", "paper_7b", "finetune")
    shapes = read_shapes(config)
    works = lengths.works(shapes, 2048, tiles=1.0)
    one = step(nodes=8, grows=False, work=mean(works), works=works)
    dealt = deal(works, shapes, TRAINS, ranks=64, global_batch=128, micro_batch=64, budget=one.choice.budget)
    assert one.compute / (one.compute + one.waiting) == pytest.approx(dealt.useful)
    assert one.held_back_by.startswith("the slowest rank")


def test_dealing_even_samples_leaves_nobody_waiting_and_one_long_one_everybody() -> None:
    config = composed("a100x8", "paper_7b", "finetune")
    shapes = read_shapes(config)

    def useful(text: list[int]) -> float:
        works = Lengths(text, [0] * len(text), [0] * len(text)).works(shapes, 2048, tiles=1.0)
        made = deal(works, shapes, TRAINS, ranks=4, global_batch=4, micro_batch=8, budget=None)
        assert made.useful <= made.by_step <= 1 + 1e-9
        return made.useful

    works = Lengths([100], [0], [0]).works(shapes, 2048, tiles=1.0)
    with pytest.raises(UserError, match="longer than any micro-batch"):
        deal(works, shapes, TRAINS, ranks=1, global_batch=1, micro_batch=1, budget=99)
    assert useful([100] * 16) == pytest.approx(1.0)
    assert useful([100, 100, 100, 2000]) < 0.3


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"text": [1], "images": [], "supervised": [1]}', '{"text": "x", "images": "y"}',
                '{"text": [-1], "images": [0], "supervised": [0]}', '{"text": [], "images": [], "supervised": []}'],
)  # fmt: skip
def test_lengths_that_are_none_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    path.write_text(content)
    with pytest.raises(UserError, match="holds no lengths"):
        read_lengths(path)
    with pytest.raises(UserError, match="is not there"):
        read_lengths(tmp_path / "other.json")


def test_the_command_tells_of_8_64_and_512_cards(capsys: Any) -> None:
    words = ["stage=finetune", "experiment=paper_7b", "hardware=a100x8_2nodes", f"--lengths={LENGTHS}"]
    assert plan.main([*words, "--samples=665298"]) == 0
    out = capsys.readouterr().out
    count = len(json.loads(LENGTHS.read_text())["text"])
    assert f"the mean of {count} counted samples" in out
    for said in (
        "in 2 nodes of a100-80gb", "a step of 128 samples in", "(counted)", "estimated", "a checkpoint: 95.5",
        "images/s", "   512    128  cannot be dealt", "   512   8192", "with the global batch kept", "another recipe",
    ):  # fmt: skip
        assert said in out, said
    assert plan.main([*words[:3], "--network=12.5", "--disk=1"]) == 0
    slower = capsys.readouterr().out
    assert "12.5 GB/s between them; ranks taken as even" in slower
    for flags, what in ((["--network=0"], "no amount"), (["--text=3"], "two answers"), (["--disk=nan"], "no amount")):
        with pytest.raises(UserError, match=what):
            plan.main([*words, *flags])


def test_one_card_has_no_table(capsys: Any) -> None:
    assert plan.main(["stage=align", "experiment=paper_7b", "hardware=a100x1"]) == 0
    assert "other numbers of nodes" not in capsys.readouterr().out
