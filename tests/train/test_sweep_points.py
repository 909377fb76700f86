"""From a sweep's command line to its trials: axes, ids, shared stages, shares of the machine, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorformer.errors import UserError
from anchorformer.schema import parse, to_plain
from data.overrides import options
from evals.run_keys import without
from tests.train.cases import ALIGN, run_config
from tests.train.fake_trials import say
from train.choices import StageName
from train.run.identity import MAY_CHANGE, hashed, numbers
from train.sweep import points as planning
from train.sweep.config import SweepConfig
from train.sweep.points import Plan, adopt, config_hash, plan
from train.sweep.slots import share_out
from train.sweep.trial import State, TrialFolder
from train.sweep.words import read, text, words_for

VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("abc ,='[]{}0.e-:/é", max_size=6)
)
TINY = ("experiment=smoke", "engine=plain")


def sweep(**values: object) -> SweepConfig:
    return parse(SweepConfig, {"name": "test", "overrides": TINY, "grids": {}, **values}, "test")


def planned(*words: str) -> Plan:
    return plan(read(["sweep=miniworld_smoke", "seeds=[0]", *words]))


@pytest.mark.parametrize("name", options("sweep"))
def test_every_sweep_of_conf_is_one(name: str) -> None:
    config = read([f"sweep={name}", "data.root=/data"])
    assert config.name == name, "its folder is found by the name that was typed"
    assert list(planning.points(config))


def test_the_paper_s_sweep() -> None:
    found = [values for _, values in planning.points(read(["sweep=anchors_depth"]))]
    pairs = {(values["model.selector.num_anchors"], values["model.connector.depth"]) for values in found}
    assert pairs == {(anchors, depth) for anchors in (65, 145, 257) for depth in (3, 6, 9, 12)}
    assert len(found) == 12


def test_values_on_the_command_line_are_axes() -> None:
    config = read(["sweep=miniworld_smoke", "model.selector.num_anchors=9", "model.connector.depth=1,2", "seeds=[3,4]",
                   "finetune:stage.trains.connector.lr=1e-3,2e-3", "align:stage.max_steps=7"])  # fmt: skip
    found = [values for _, values in planning.points(config)]
    assert len(found) == 2 * 2 * 2
    assert {values["model.selector.num_anchors"] for values in found} == {9}, "one value takes the place of an axis too"
    assert {values["model.connector.depth"] for values in found} == {1, 2}
    assert {values["finetune:stage.trains.connector.lr"] for values in found} == {1e-3, 2e-3}
    assert {values["seed"] for values in found} == {3, 4}
    align, finetune = (words_for(stage, config.overrides, found[0]) for stage in StageName)
    assert "stage.max_steps=7" in align
    assert "stage.max_steps=7" not in finetune
    assert [word for word in finetune if "lr" in word] == ["stage.trains.connector.lr=0.001"]
    assert not [word for word in align if "lr" in word]


@settings(deadline=None)
@given(st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3)))
def test_a_value_comes_back_from_its_override(value: object) -> None:
    from data.overrides import alternatives

    assert alternatives(f"key={text(value)}") == ("key", [value])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run=mine"], "'run' is given to each run"),
        (["resume=never,auto"], "'resume' is given to each run"),
        (["seed=0,1"], "'seed' is no axis"),
        (["name=../mine"], "no folder name"),
        (["slots=0"], "do not fit SweepConfig"),
        (["seeds=[1,1]"], "seeds has to name different ones"),
        (["stages=[finetune,align]"], "wrong order"),
        (["stages=[align]"], "a stage that is not run"),
        (["slot=2"], "unknown key 'slot'"),
        (["init_from=elsewhere"], "init_from is given to finetune"),
        (["model.connector.dept=1,2"], "unknown key 'model.connector.dept'"),
        (["selector=anchor_tiny,anchr"], "seed=0: there is no selector 'anchr'"),
        (["hardware.nodes=2"], "one node"),
        (["align:model.connector.depth=3"], "'model.connector.depth' is an axis of the sweep"),
        (["stage.max_steps=3", "align:stage.max_steps=1,2"], "'stage.max_steps' is an axis of the sweep"),
        (["align:stage.max_steps=3", "stage.max_steps=1,2"], "'stage.max_steps' is an axis of the sweep"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_starts(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        planned(*words)
    assert said in str(caught.value)


def test_a_key_that_came_later_and_says_what_was_so_changes_no_hash() -> None:
    """A sweep, or a month's run, that was begun before there was such a key goes on."""
    config = run_config(ALIGN)
    plain = to_plain(config)
    assert plain["stage"].pop("lora") is None
    plain["zero"] = {"stage": 2, "overlap_comm": True, "bucket_size": 200_000_000}
    assert hashed(config) == plain
    assert "lora" not in numbers(config)["stage"]


@pytest.mark.slow
def test_what_is_left_out_of_a_hash_is_a_key_of_a_config() -> None:
    config = to_plain(run_config(ALIGN))
    for key in MAY_CHANGE:
        assert without(config, [key]) != config, f"{key} is none, or another by now"


def test_two_spellings_are_one_trial_and_another_value_is_another() -> None:
    base = planned("model.selector.num_anchors=9", "model.connector.depth=2")
    [(path, trial)] = base.of_points.items()
    assert path.name == trial.id
    # The experiment's depth is 2 already; threads, names and a shared file of overrides do not make it another trial.
    same = sweep(grids={"a": [{"model.selector.num_anchors": [9]}], "b": [{"model.selector.num_anchors": 9,
                 "model.connector.depth": 2, "connector": "anchor_former_tiny", "hardware.threads": 3}]},
                 overrides=(*TINY, "hardware.ranks=1", "hardware.micro_batch=32"), seeds=(0,))  # fmt: skip
    found = plan(same)
    assert len(found.points) == 2
    assert {point.trial for point in found.points} == {trial.id}
    assert len(found.trials) == 2, "the trial, and the stage 1 that it starts from"
    for word in ("seeds=[1]", "finetune:stage.max_steps=9"):
        other = planned("model.selector.num_anchors=9", "model.connector.depth=2", word)
        assert {point.trial for point in other.points} != {trial.id}, word


def test_a_changed_default_of_the_code_is_another_trial() -> None:
    config = run_config(ALIGN)
    changed = dataclasses.replace(config, stage=dataclasses.replace(config.stage, eps=1e-7))
    assert config_hash({StageName.align: config}) != config_hash({StageName.align: changed})
    log = dataclasses.replace(config.log, every=11)
    renamed = dataclasses.replace(config, run="other", resume="auto", output_root="elsewhere", log=log)
    assert config_hash({StageName.align: config}) == config_hash({StageName.align: renamed})


@pytest.mark.slow
def test_stage_one_is_shared_where_its_config_is_the_same() -> None:
    found = planned("model.selector.num_anchors=9", "model.connector.depth=1,2", "finetune:stage.max_steps=5,6")
    assert len(found.of_points) == 4
    shared = [trial for path, trial in found.trials.items() if path.parent.name == "shared"]
    assert len(shared) == 2
    for path, trial in found.of_points.items():
        start = found.trials[Path(trial.needs or "")]
        assert trial.runs["align"] == start.runs["align"] == f"{trial.needs}/align"
        assert trial.runs["finetune"] == str(path / "finetune")
        assert f"init_from={trial.runs['align']}" in trial.steps[0].argv
        assert start.point.get("model.connector.depth") == trial.point["model.connector.depth"]
        assert "finetune:stage.max_steps" not in start.point
    assert [step.name.split()[0] for step in shared[0].steps] == ["align", "evals"]


@pytest.mark.slow
def test_what_is_done_stays_and_a_new_evaluation_is_what_is_left(tmp_path: Path) -> None:
    words = ("model.selector.num_anchors=9", "model.connector.depth=2", f"output_root={tmp_path}")
    made = planned(*words)
    [(path, trial)] = made.of_points.items()
    assert adopt(path, trial).state is State.pending
    TrialFolder(path).note(state=State.done, finished=tuple(step.name for step in trial.steps), seconds=7.0)
    again = adopt(path, planned(*words).of_points[path])
    assert (again.state, again.seconds, again.left) == (State.done, 7.0, [])
    more = planned(*words, "evals.finetune=['task=miniworld_doc']")
    assert path in more.of_points, "what is asked of a model does not make it another"
    asked = adopt(path, more.of_points[path])
    assert asked.state is State.pending
    assert [step.name for step in asked.left] == ["evals finetune task=miniworld_doc"]
    assert json.loads((path / "trial.json").read_text())["config_hash"].startswith(trial.id)
    assert say(tmp_path, "x") not in asked.steps


@pytest.mark.slow
def test_variants_of_a_grid_are_evaluations_more_of_its_trials() -> None:
    grids = {"a": [{"model.selector.num_anchors": [9, 5]}], "b": [{"model.selector.num_anchors": 9}]}
    given = sweep(
        grids=grids, overrides=(*TINY, "data.feature_cache=f"), evals={"finetune": ("task=miniworld_doc",)},
        variants={"b": {"close": ("decoding=damro", "decoding.alpha=1")}, "a": {"far": ("decoding=damro",)}},
    )  # fmt: skip
    steps = {
        trial.point["model.selector.num_anchors"]: [step.argv[step.argv.index("-m") + 1 :] for step in trial.steps[1:]]
        for trial in plan(given).of_points.values()
    }
    assert [[word for word in argv if "variant" in word] for argv in steps[9]] == [
        [],
        ["variant=far"],
        ["variant=close"],
    ]
    assert [[word for word in argv if "variant" in word] for argv in steps[5]] == [[], ["variant=far"]]
    assert steps[9][2][3:] == ("task=miniworld_doc", "decoding=damro", "decoding.alpha=1", "variant=close")
    assert not any("feature_cache" in word for argv in steps[9][1:] for word in argv), "it is not of these models"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"variants": {"b": {"x": ("decoding=damro",)}}}, "variants.b"),
        ({"evals": {}, "variants": {"a": {"x": ("decoding=damro",)}}}, "no evals.finetune|evals.finetune"),
    ],
)  # fmt: skip
def test_variants_of_what_is_not_there_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        sweep(**{"grids": {"a": [{}]}, "evals": {"finetune": ("task=miniworld_doc",)}, **change})


def test_an_evaluation_that_does_not_compose_ends_the_plan() -> None:
    with pytest.raises(UserError, match="top_q"):
        plan(sweep(
            grids={"a": [{}]}, evals={"finetune": ("task=miniworld_doc",)},
            variants={"a": {"x": ("decoding=damro", "decoding.top_q=1")}},
        ))  # fmt: skip


def test_the_neighbours_are_compared_at_one_budget() -> None:
    config = read(["sweep=miniworld_neighbours"])
    assert "Experimental" in config.note
    patches = {"anchor_former_tiny": 16}
    for grid, values in planning.points(config):
        if grid not in ("unpruned", "sampled"):
            name = values.get("selector", "anchor_former_tiny")
            keeps_cls = name in ("average", "cls_similarity", "visionzip", "anchor_former_tiny")
            patches[str(name)] = values["model.selector.num_anchors"] - keeps_cls
    assert set(patches.values()) == {16}
    asked = [word for words in config.variants["unpruned"].values() for word in words if "num_anchors" in word]
    assert {int(word.partition("=")[2]) for word in asked} == {16, 17}


@settings(deadline=None, max_examples=30)
@given(cards=st.integers(0, 16), ranks=st.integers(1, 8), slots=st.none() | st.integers(1, 8))
def test_slots_share_no_card(cards: int, ranks: int, slots: int | None) -> None:
    config = run_config(ALIGN, hardware__device="cuda", hardware__ranks=ranks, stage__global_batch=ranks)
    asked = sweep(grids={"a": [{}]}, cards=list(range(cards)) or None, slots=slots) if cards else None
    if asked is None:
        return
    needed = (slots or 1) * ranks
    if needed > cards:
        with pytest.raises(UserError, match="fewer cards"):
            share_out(asked, [config])
        return
    found = share_out(asked, [config])
    assert len(found) == (slots or cards // ranks)
    named = [card for slot in found for card in slot.cards]
    assert len(named) == len(set(named)) == len(found) * ranks
    assert found[0].environment({"HOME": "/me"}) == {"HOME": "/me", "CUDA_VISIBLE_DEVICES": ",".join(found[0].cards)}


def test_on_the_cpu_slots_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    config = run_config(ALIGN)
    one, other = share_out(sweep(grids={"a": [{}]}, slots=2), [config])
    assert (one.cores, other.cores, one.cards) == ({0, 1}, {2, 3}, ())
    many = share_out(sweep(grids={"a": [{}]}, slots=7), [config])
    assert all(len(slot.cores) == 1 for slot in many)


def test_the_ablation_compares_at_equal_t() -> None:
    config = read(["sweep=miniworld_ablation"])
    found = list(planning.points(config))
    assert [values["seed"] for _, values in found] == sorted(values["seed"] for _, values in found)
    assert {grid for grid, _ in found} == {"connectors", "anchors", "selectors"}
    assert len(config.seeds) >= 3
