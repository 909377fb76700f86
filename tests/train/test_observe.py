"""What a run shows while it trains: it changes no number, is complete at every step, and is taken back with the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from anchorformer.connectors.base import PACKAGE as CONNECTOR_PACKAGE
from anchorformer.connectors.base import ConnectorConfig
from anchorformer.contracts import Anchors, VisionFeatures
from anchorformer.errors import UserError
from anchorformer.model_folder import MANIFEST
from anchorformer.schema import parse_plugin
from data.overrides import CONF
from evals.questions import Question
from tests.train.cases import ALIGN, FINETUNE
from tests.train.ranks import Ranks
from train import rank, trainer
from train.compose import compose
from train.distributed import World, alone
from train.observe import anchors
from train.observe.checks import check_shown
from train.observe.health import SHADE, Look, Taps, _overlays, fixed_questions, measures
from train.observe.validation import SharedRespondent, Validation, is_sharded, looking
from train.run.folder import RunFolder

MakeRun = Callable[..., RunFolder]
MIX = {"_target_": "data.sources.llava.LlavaConfig", "annotations": "mix.json", "images": "images"}
TASKS = {
    "mix": {"_target_": "evals.tasks.vqa.VqaTask", "source": MIX, "max_new_tokens": 6},
    "captions": {"_target_": "evals.tasks.caption_loss.CaptionLossTask", "source": MIX},
}
SHOWN = {
    "eval__every": 2, "eval__tasks": TASKS, "eval__limit": 7, "eval__batch_size": 2, "health__every": 3,
    "health__images": 4, "health__max_new_tokens": 4, "profile": "step:2-3",
}  # fmt: skip


class Left(Exception):
    """Planted: the process goes away in the middle of a step."""


def run_to(world: World, folder: str, leave_at: int | None = None) -> None:
    """Runs a prepared folder on this rank, to its end or to the middle of a step."""
    run = RunFolder(Path(folder))
    config = run.read_config()
    rank.prepare_process(config)
    check = trainer.check_numbers

    def planted(step: int, *rest: Any) -> None:
        if step == leave_at:
            raise Left
        check(step, *rest)

    trainer.check_numbers = planted  # type: ignore[assignment]
    try:
        rank.run_rank(config, run, world)
    except Left:
        pass
    finally:
        trainer.check_numbers = check


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(folder: RunFolder) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in lines(folder.metrics)]


def weights(folder: RunFolder) -> dict[str, Any]:
    return dict(json.loads((folder.model / MANIFEST).read_text()))


def test_watching_changes_no_number(make_run: MakeRun) -> None:
    plain, watched = make_run("plain", FINETUNE), make_run("watched", FINETUNE, **SHOWN)
    for folder in (plain, watched):
        run_to(alone(), str(folder.path))
    assert numbers(watched) == numbers(plain)
    assert weights(watched) == weights(plain)
    nothing = (plain.health, plain.evals, plain.media, plain.tracker, plain.path / "profile")
    assert not any(path.exists() for path in nothing)
    assert watched.trace(2, 3, 0).is_file()

    records = lines(watched.evals)
    assert [(line["step"], line.get("dataset"), line.get("task")) for line in records] == [
        (step, *names) for step in (2, 4, 6) for names in (("captions", None), ("mix", None), (None, "mix"))
    ]
    assert records[0]["loss"] == records[1]["loss"], "two tasks over the same questions"
    assert {"metric": "exact_match", "n": 7}.items() <= records[2].items()
    looks = lines(watched.health)
    assert [line["step"] for line in looks] == [3, 6]
    for look in looks:
        assert look["images"] == 4
        names = ("coverage", "patches_used", "common_share", "head_overlap", "cls_entropy", "connector_entropy")
        assert all(0 <= look[name] <= 1 for name in names)
    folder = watched.media / "step-00000003"
    told = json.loads((folder / "answers.json").read_text())
    assert [sorted(one) for one in told] == [["answer", "id", "loss", "overlays", "question", "references"]] * 4
    assert all(Image.open(folder / name).width >= 300 for one in told for name in one["overlays"])


@pytest.mark.slow
def test_watching_changes_no_number_of_a_sharded_run(pair: Ranks, make_run: MakeRun) -> None:
    sharded = {"engine": "deepspeed", "zero__stage": 3, "hardware__ranks": 2, "stage__max_steps": 4}
    plain, watched = make_run("plain", FINETUNE, **sharded), make_run("watched", FINETUNE, **sharded, **SHOWN)
    for folder in (plain, watched):
        pair.run(run_to, folder=str(folder.path))
    assert numbers(watched) == numbers(plain)
    assert weights(watched) == weights(plain)
    assert [line["step"] for line in lines(watched.health)] == [3, 4]
    assert {line["step"] for line in lines(watched.evals)} == {2, 4}


@pytest.mark.slow
def test_what_was_shown_is_taken_back_with_the_run(make_run: MakeRun) -> None:
    often = {**SHOWN, "eval__every": 1, "health__every": 1, "checkpoint__every": 2}
    whole, broken = make_run("whole", ALIGN, **often), make_run("broken", ALIGN, **often, resume="auto")
    run_to(alone(), str(whole.path))
    run_to(alone(), str(broken.path), leave_at=4)
    assert (broken.media / "step-00000003").is_dir()
    assert lines(broken.evals)[-1]["step"] == 3, "from step 2 it goes on, so that this one is shown twice"
    (broken.media / "step-00000005").mkdir()
    run_to(alone(), str(broken.path))
    assert lines(broken.evals) == lines(whole.evals)
    assert lines(broken.health) == lines(whole.health)
    assert [path.name for path in sorted(broken.media.iterdir())] == [f"step-{step:08d}" for step in range(1, 7)]


def ask(world: World, folder: str) -> tuple[Any, Any, list[Any]]:
    """Losses, answers and records of a run's validation, on a model that is trained a step afterwards."""
    from transformers import AutoProcessor

    from anchorformer.processing import AnchorFormerProcessor
    from anchorformer.weights import load_model
    from data.loader import Loader
    from train.engine import build_engine, loading
    from train.facts import gather_facts
    from train.faults.progress import Progress
    from train.stage import freeze

    run = RunFolder(Path(folder))
    config = run.read_config()
    rank.prepare_process(config)
    processor = AutoProcessor.from_pretrained(run.start).with_template(config.stage.template)
    with loading(config, world, torch.float32):
        model = load_model(run.start, torch.float32, config.model.connector)
    freeze(model, config.stage)
    engine = build_engine(model, config, world, 4, torch.float32)
    validation = Validation(config, world)
    questions = validation._tasks["mix"][1]
    with looking(engine.model), pytest.MonkeyPatch.context() as patch:
        # Nearly every word ends an answer, each rank's at another token.
        patch.setattr(AnchorFormerProcessor, "stop_token_ids", list(range(0, 400, 3)))
        respondent = SharedRespondent(engine.model, processor, 2, world, Progress(), is_sharded=is_sharded(config))
        found = respondent.answer_losses(questions), respondent.answers(questions, 12)
        records = list(validation.run(1, respondent))
    batches = next(iter(Loader(config, processor, world.rank, world.size)))
    facts = gather_facts(world, batches)
    loss, _ = engine.agree(engine.accumulate(batches, facts.supervised))
    engine.step()
    return (*found, [*records, loss])


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_ranks_share_uneven_questions(pair: Ranks, make_run: MakeRun, zero: int) -> None:
    one = make_run("one", FINETUNE, **SHOWN)
    two = make_run("two", FINETUNE, **SHOWN, engine="deepspeed", zero__stage=zero, hardware__ranks=2)
    losses, answers, records = ask(alone(), str(one.path))
    # Seven questions for two ranks, of which two have no image.
    assert len({len(answer) for answer in answers}) > 2, answers
    for found in pair.run(ask, folder=str(two.path)):
        assert [count for _, count in found[0]] == [count for _, count in losses]
        np.testing.assert_allclose([loss for loss, _ in found[0]], [loss for loss, _ in losses], rtol=1e-5)
        assert found[1] == answers
        assert found[2][-1] == pytest.approx(records[-1], rel=1e-5), "and the model still trains"
        for record, expected in zip(found[2][:-1], records[:-1], strict=True):
            assert record == pytest.approx(expected)


def test_shares_do_not_depend_on_the_ranks() -> None:
    questions = [Question(str(n), (("user", "?"),), () if n % 3 else ("image",), ("a",), {}) for n in range(7)]  # type: ignore[arg-type]
    for size in (1, 2, 3, 5):
        asked = []
        for number in range(size):
            respondent = SharedRespondent.__new__(SharedRespondent)
            world = _Scripted(number, size, questions)
            respondent._world, respondent._progress, respondent._batch_size = world, _Silent(), 2  # type: ignore[assignment]

            def answered(part: Any, kinds: list[bool] = world.kinds) -> list[str]:
                kinds.append(bool(part[0].images))
                assert len({bool(item.images) for item in part}) == 1
                return [item.id for item in part]

            assert respondent._share(questions, answered) == [item.id for item in questions]
            asked.append(world.kinds)
        assert all(kinds == asked[0] for kinds in asked), "every rank makes the same passes"


class _Silent:
    def enter(self, *_: object) -> None: ...


class _Scripted:
    """A rank whose peers answer as they would."""

    def __init__(self, rank: int, size: int, questions: list[Question]) -> None:
        self.rank, self.size, self._questions, self.kinds = rank, size, questions, list[bool]()
        self._calls = 0

    def gather(self, mine: list[str]) -> list[list[str]]:
        has_image = self._calls == 0
        self._calls += 1
        own = [item.id for item in self._questions if bool(item.images) is has_image]
        dealt = own + own[:1] * (-len(own) % self.size)
        gathered = [dealt[rank :: self.size] for rank in range(self.size)]
        assert gathered[self.rank] == mine
        return gathered


def test_measures_of_known_selections() -> None:
    indices = torch.tensor([[0, 1, 6], [0, 1, 16]])
    hits = anchors.hits(indices, 17, has_cls=True)
    assert hits.sum(1).tolist() == [2, 2]
    assert anchors.coverage(hits) == pytest.approx(2 / 16)
    assert anchors.patches_used(hits) == pytest.approx(3 / 16)
    assert anchors.common_share(hits) == pytest.approx(1 / 2)
    fine = torch.zeros(1, 576, dtype=torch.bool)
    fine[0, :6] = True  # one row of one cell of 6 x 6 patches
    assert anchors.coverage(fine) == pytest.approx(1 / 16)
    same = torch.tensor([[[3.0, 2, 1, 0], [9.0, 8, 1, 0], [0, 1, 2.0, 3]]])
    assert anchors.head_overlap(same, 2) == pytest.approx(2 / 6), "one of three pairs agrees"
    assert anchors.entropy(torch.zeros(2, 8)) == pytest.approx(1)
    assert anchors.entropy(torch.tensor([0.0, -torch.inf])) == 0


STACK = {"depth": 2, "num_heads": 2, "head_dim": 8}
CONNECTORS = {
    "anchor_former": STACK, "resampler": STACK, "resampler_flamingo": STACK,
    "resampler_mqt": {"num_queries": 4, "num_heads": 2},
    "resampler_honeybee": {"num_queries": 4, "depth": 2, "num_heads": 2, "width": 16, "ff_width": 16},
    "qformer": {"num_queries": 4, "depth": 3, "num_heads": 2, "width": 16, "ff_width": 16},
}  # fmt: skip
ATTENTIONS = {"resampler_mqt": 1}
"""Cross-attentions of each, where it is not two."""


WITHOUT_MASK = ("resampler_mqt",)
"""Connectors that need the raster of one tile, where nothing is hidden."""


CASES = [(name, masked) for name in CONNECTORS for masked in (False, True) if not (masked and name in WITHOUT_MASK)]


@pytest.mark.parametrize(("name", "masked"), CASES)
@torch.no_grad()
def test_connector_entropy_is_an_eager_softmax(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = yaml.safe_load((CONF / "connector" / f"{name}.yaml").read_text()) | CONNECTORS[name]
    torch.manual_seed(0)
    connector = parse_plugin(ConnectorConfig, spec, CONNECTOR_PACKAGE, name).build(16, 12).eval()
    for parameter in connector.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.5)  # queries that start at zero look evenly
    tokens, real = torch.randn(3, 17, 16), torch.tensor([17, 5, 9])
    mask = torch.arange(17) < real[:, None] if masked else None
    expected = []

    def eager(query: Any, key: Any, value: Any, *, scale: float, mask: Any = None, **_: Any) -> Any:
        logits = query @ key.mT * scale
        hidden = torch.zeros(1, 1, 1, key.shape[2], dtype=torch.bool) if mask is None else ~mask
        shares = logits.masked_fill(hidden, -1e9).softmax(-1)
        entropy = -(shares * (shares + 1e-30).log()).sum(-1)
        if key.shape[2] >= 16:  # the Q-Former's queries talk to each other as well
            expected.append(float((entropy / (~hidden).sum(-1).log()).mean()))
        return (shares @ value).transpose(1, 2)

    monkeypatch.setattr("anchorformer.connectors.blocks.attend", eager)
    monkeypatch.setattr("anchorformer.kernels.vision_attention.attend", eager)
    features = VisionFeatures(tokens, None, True, mask_BN=mask)
    with Taps(SimpleNamespace(vision_tower=nn.Identity(), selector=nn.Identity(), connector=connector)) as taps:
        connector(Anchors(tokens[:, :4], None), features)
    assert len(expected) == ATTENTIONS.get(name, 2)
    assert all(value < 0.99 for value in expected), "an even look shows nothing"
    assert taps.take().attention == pytest.approx(expected, rel=1e-5)


PATCHES = 16


def passed(tiles: int, views: int, *chosen: list[int], has_cls: bool = True) -> Look:
    """Tiles of 8 x 8 pixels in one colour, seen as so many views, with these anchors."""
    tokens = torch.zeros(views, has_cls + PATCHES * tiles // views, 4)
    anchors = Anchors(torch.zeros(views, len(chosen[0]), 4), torch.tensor(chosen)) if chosen else Anchors(tokens, None)
    return Look([torch.zeros(tiles, 3, 8, 8)], [(VisionFeatures(tokens, None, has_cls), anchors)])


def light(look: Look) -> list[set[int]]:
    """Patches of each overlay that are as bright as the image; the others are dark, and each is of one colour."""
    shown = []
    for picture in _overlays(look, SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.2] * 3)):
        assert picture.size == (336, 336)
        by_patch = np.asarray(picture).reshape(4, 84, 4, 84, 3).transpose(0, 2, 1, 3, 4).reshape(PATCHES, -1)
        assert (by_patch == by_patch[:, :1]).all()
        assert set(by_patch[:, 0]) <= {128, int(128 * SHADE)}
        shown.append({int(patch) for patch in np.flatnonzero(by_patch[:, 0] == 128)})
    return shown


def test_patches_that_are_no_anchors_are_dark() -> None:
    everything = set(range(PATCHES))
    assert light(passed(1, 1, [0, 1, 6, 16])) == [{0, 5, 15}]
    assert light(passed(1, 1, [1, 6, 15], has_cls=False)) == [{1, 6, 15}]
    assert light(passed(2, 2, [0, 1, 2], [0, 3, 4])) == [{0, 1}, {2, 3}]
    assert light(passed(1, 1)) == [everything], "merged tokens are no patches"
    over_all_tiles = passed(4, 1, [0, 1, 17, 33])
    assert light(over_all_tiles) == [everything] * 4
    assert measures([over_all_tiles]) == {}
    assert measures([passed(2, 2, [0, 1, 2], [0, 3, 4])])["patches_used"] == 4 / PATCHES


def test_fixed_images_are_the_same_every_time_and_have_one_image_each(make_run: MakeRun) -> None:
    config = make_run("fixed", ALIGN, health__every=1, health__images=9).read_config()
    questions = fixed_questions(config)
    assert questions == fixed_questions(config)
    assert len({item.id for item in questions}) == 9
    assert all(len(item.images) == 1 and item.references for item in questions)
    assert len(fixed_questions(make_run("all", ALIGN, health__every=1, health__images=99).read_config())) == 20


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"eval__every": 1, "eval__tasks": {"mix": {"_target_": "evals.tasks.none.No"}}}, "evals.tasks.none"),
        ({"eval__every": 1, "eval__tasks": {"x": TASKS["captions"] | {"source": MIX | {"images": "none"}}}}, "none"),
        ({"tracker": {"_target_": "train.observe.trackers.wandb.WandbConfig", "mode": "online"}}, "WANDB_API_KEY"),
        ({"tracker": {"_target_": "train.observe.trackers.none.NoTracker", "projct": "x"}}, "projct"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_start(
    make_run: MakeRun, changes: dict[str, Any], found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=found):
        check_shown(make_run("wrong", ALIGN, **changes).read_config())


def test_tasks_are_named_on_the_command_line() -> None:
    given = ["stage=align", "data.root=/data", "eval.every=5"]
    two = ["eval.tasks=[docvqa_val,chartqa_test]", "eval.tasks.docvqa_val.max_new_tokens=8"]
    tasks = compose([*given, *two]).eval.tasks
    assert {name: task.get("max_new_tokens") for name, task in tasks.items()} == {"docvqa_val": 8, "chartqa_test": None}
    for words, found in ((["eval.tasks=[docvqa]"], "docvqa"), ([], "every=5"), (["eval.tasks=[]"], "every=5")):
        with pytest.raises(UserError, match=found):
            compose([*given, *words])
