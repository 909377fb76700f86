"""Training where images have different numbers of anchors: counted before the run, packed, cut, resumed, evaluated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from anchorformer.decoding.greedy import Greedy
from anchorformer.errors import UserError
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.seen import look
from anchorformer.weights import load_model
from data.counted import Table, counted
from data.loader import Loader
from data.mixture import open_sources
from tests.anchorformer.test_correlation import TILING, TINY
from tests.train.cases import ALIGN, EVERYTHING, FINETUNE
from tests.train.conftest import write_run
from tests.train.ranks import Ranks
from tests.train.test_feature_cache import cached_run, losses, with_cache
from tests.train.test_observe import MIX, TASKS, lines
from tests.train.test_resume import record, run_until
from tests.train.tiny_world import write_world
from train import rank
from train.choices import Part
from train.compose import compose
from train.config import PartConfig
from train.distributed import alone
from train.features import fill_cache, own_cache
from train.prepare import check_parts, check_samples, prepare
from train.run.folder import RunFolder

Assemble = Callable[..., Path]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen records: of no, one or two images, blank, striped and noisy ones, wide and tall, and long answers."""
    root, draw = tmp_path_factory.mktemp("documents"), np.random.default_rng(0)
    (root / "images").mkdir()
    records = []
    for number in range(16):
        names = []
        for place in range((1, 0, 2, 1)[number % 4]):
            height, width = ((30, 60), (60, 60), (60, 30))[(number + place) % 3]
            pixels = np.full((height, width, 3), 255, np.uint8)
            pixels[: height * (number % 5) // 4] = draw.integers(0, 256, (height * (number % 5) // 4, width, 3))
            names.append(f"{number}-{place}.png")
            Image.fromarray(pixels).save(root / "images" / names[-1])
        said = [
            {"from": "human", "value": "<image>\n" * len(names) + "what color is the star?"},
            {"from": "gpt", "value": f"{'red ' * (1 + number % 5)}{number}"},
        ]
        records.append({"id": f"d{number}", "conversations": said} | ({"image": names} if names else {}))
    (root / "mix.json").write_text(json.dumps(records))
    return root


@pytest.fixture(scope="module")
def start(assemble_tiny: Assemble) -> Path:
    return assemble_tiny(selector=TINY, tiling=TILING)


@pytest.fixture
def make(start: Path, documents: Path, tmp_path: Path) -> Callable[..., RunFolder]:
    """A run of the ragged model whose images have been looked at; `data__...` are its data's values."""

    def build(name: str, trains: dict[str, Any] = ALIGN, *, folder: Path = start, **changes: Any) -> RunFolder:
        data = {key.removeprefix("data__"): changes.pop(key) for key in [*changes] if key.startswith("data__")}
        run = write_run(tmp_path, folder, documents, name, trains, **{"stage__max_steps": 3} | changes)
        values = yaml.safe_load(run.config.read_text())
        values["data"] |= {"cache_dir": str(tmp_path / "cache"), **data}
        run.write_sealed({run.config.name: yaml.safe_dump(values)})
        return with_cache(run, tmp_path / "features")

    return build


def loader_of(run: RunFolder) -> tuple[Loader, AnchorFormerProcessor]:
    config = run.read_config()
    processor = AnchorFormerProcessor.from_pretrained(run.start).with_template(config.stage.template)
    return Loader(config, processor, 0, 1, features=own_cache(config, run.start)), processor


def test_two_stages_on_one_cache(make: Any, tmp_path: Path) -> None:
    """Two stages, the tower asleep; then the trained model looks by itself, and chooses what it was trained on."""
    run = make("align")
    cached_run(alone(), str(run.path))
    second = make("finetune", FINETUNE, folder=run.model)
    cached_run(alone(), str(second.path))
    assert [len(losses(each)) for each in (run, second)] == [3, 3]
    assert losses(run)[0] != losses(run)[2]
    assert len([*(tmp_path / "features").iterdir()]) == 1  # one tower, one rule, two stages
    model = load_model(second.model, torch.float32).eval()
    loader, processor = loader_of(second)
    for batch in (batch for step in loader for batch in step):
        rows, counts = model.encode_views(batch.tiles_B3HW, batch.tile_counts) if len(batch.tiles_B3HW) else ([], ())
        assert counts == batch.token_counts
        assert len(rows) == int((batch.input_ids_S == processor.image_token_id).sum())
        assert torch.equal(
            batch.position_ids_S[batch.cu_seqlens[:-1].long()], torch.zeros(len(batch.sample_ids)).long()
        )


def test_lengths_are_those_of_what_is_seen(make: Any) -> None:
    run = make("lengths")
    loader, processor = loader_of(run)
    model, mixture = load_model(run.start, torch.float32).eval(), loader.mixture
    counts = set()
    for number in range(len(mixture)):
        record = mixture[number]
        images = [Image.open(ref.path) for ref in record.images]
        own = [each.counts for each in look(Greedy(model), processor, images)]
        assert [*record.token_counts] == own
        example = processor.encode(
            [(t.role.value, t.text) for t in record.turns], images, sample_id="", token_counts=own
        )
        assert mixture.tokens[number] == len(example.input_ids_S)
        counts.update(count for each in own for count in each)
    assert len(counts) > 3


def test_the_over_length_rules_go_by_what_is_seen(make: Any) -> None:
    run = make("whole")
    everything = loader_of(run)[0].mixture
    longest = int(everything.tokens.max())
    with pytest.raises(UserError, match="are longer than"):
        loader_of(make("error", data__max_length=longest - 1))
    lenient = {"data__max_length": longest - 1, "data__max_dropped_share": 1.0}
    dropped, _ = loader_of(make("drop", data__overlength="drop", **lenient))
    assert dropped.mixture.num_dropped == int((everything.tokens == longest).sum())
    cut, processor = loader_of(make("cut", data__overlength="truncate_answer", **lenient))
    assert cut.mixture.tokens.max() == longest - 1
    images = (record.images for record in map(everything.__getitem__, range(len(everything))))
    assert len(cut.mixture) == len(everything)
    assert sum(map(len, images)) == 16
    for step in cut:
        for batch in step:
            assert int((batch.input_ids_S == processor.image_token_id).sum()) == sum(batch.token_counts)


def test_a_budget_of_positions_packs_by_what_is_seen(make: Any) -> None:
    run = make("packed", data__token_budget=130, hardware__micro_batch=8, stage__global_batch=8)
    loader, _ = loader_of(run)
    sizes = [batch.num_tokens for step in loader for batch in step]
    assert max(sizes) <= 130
    cached_run(alone(), str(run.path))
    one = make("one", hardware__micro_batch=1, stage__global_batch=8)
    cached_run(alone(), str(one.path))
    assert losses(run) == pytest.approx(losses(one), rel=1e-5)


def test_losses_are_those_of_a_tower_that_runs(make: Any) -> None:
    """The same steps with every choice made anew, in every micro-batch."""
    run = make("cached")
    cached_run(alone(), str(run.path))
    loader, _ = loader_of(run)
    model = load_model(run.start, torch.float32).train()
    (first, *_), supervised = [*loader], 0
    supervised = sum(batch.num_supervised for batch in first)
    from train.loss import supervised_loss

    live = sum(supervised_loss(model, replace(batch, features=None), supervised).item() for batch in first)
    assert live == pytest.approx(losses(run)[0], rel=1e-5)


def test_counts_that_do_not_hold_are_refused(make: Any, tmp_path: Path) -> None:
    run = make("planted")
    config = run.read_config()
    cache = own_cache(config, run.start)
    assert cache is not None
    ((source, _),) = open_sources(config.data)
    path = cache.counts_of(source.fingerprint)
    table = counted(source, cache)._table
    before = counted(source, cache).fingerprint
    planted = Table(table.images, table.tiles, table.tokens + 1)
    with path.open("wb") as file:
        np.savez(file, images=planted.images, tiles=planted.tiles, tokens=planted.tokens)
    assert counted(source, cache).fingerprint != before  # lengths are counted anew
    with pytest.raises(UserError, match="as many embeddings as were counted") as caught:
        [*loader_of(run)[0]]
    assert "complete-" in caught.value.remedy
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        loader_of(run)
    with path.open("wb") as file:
        np.savez(file, images=table.images[:-1], tiles=table.tiles, tokens=table.tokens)
    with pytest.raises(UserError, match="damaged"):
        loader_of(run)
    path.unlink()
    with pytest.raises(UserError, match="have not been looked at"):
        loader_of(run)
    fill_cache(config, run.start)
    loader_of(run)


def test_another_rule_is_another_cache_and_the_plan_s_share_is_not(
    make: Any, assemble_tiny: Assemble, documents: Path, tmp_path: Path
) -> None:
    run = make("own")
    other, planned = (assemble_tiny(selector=TINY | changes, tiling=TILING) for changes in
                      ({"seed": 1}, {"expected_share": 0.5}))  # fmt: skip
    config = run.read_config()
    folders = [own_cache(config, folder).folder for folder in (run.start, other, planned)]  # type: ignore[union-attr]
    assert folders[0] == folders[2] != folders[1]


def test_without_a_cache_or_with_a_tower_that_trains_nothing_starts(make: Any) -> None:
    config = make("needs").read_config()
    assert check_parts(config).model.selector == config.model.selector | {"iqr_factor": 1.5, "seed": 0, "layer": -2,
                                                                         "expected_share": 0.34}  # fmt: skip
    bare = replace(config, data=replace(config.data, feature_cache=None))
    with pytest.raises(UserError, match="depends on what the vision tower sees") as caught:
        check_parts(bare)
    assert "data.feature_cache=" in caught.value.remedy
    with pytest.raises(UserError, match="depends on what the vision tower sees"):
        check_samples(bare, make("again").start)
    stage = replace(config.stage, trains={Part(name): PartConfig(**values) for name, values in EVERYTHING.items()})
    with pytest.raises(UserError, match="frozen vision tower"):
        check_parts(replace(bare, stage=stage))


def test_images_that_cannot_be_read(make: Any, documents: Path, tmp_path: Path, start: Path) -> None:
    """An error before the run, or left out when their turn comes; never a wrong length of another record."""
    spoilt = tmp_path / "spoilt"
    shutil.copytree(documents, spoilt)
    (spoilt / "images" / "2-1.png").write_bytes(b"no image")
    run = write_run(tmp_path, start, spoilt, "strict", ALIGN)
    with pytest.raises(UserError, match="d2"):
        with_cache(run, tmp_path / "others")
    lenient = write_run(tmp_path, start, spoilt, "lenient", ALIGN, stage__max_steps=4)
    values = yaml.safe_load(lenient.config.read_text())
    values["data"] |= {"on_bad_image": "skip", "max_dropped_share": 0.5}
    lenient.write_sealed({lenient.config.name: yaml.safe_dump(values)})
    with_cache(lenient, tmp_path / "others")
    loader, _ = loader_of(lenient)
    skipped = sum(batch.num_skipped for step in loader for batch in step)
    assert skipped == 1
    sound = loader_of(make("sound"))[0].mixture
    assert sound.tokens[3:].tolist() == loader.mixture.tokens[3:].tolist()


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_it_was(make: Any) -> None:
    options = {"stage__max_steps": 4, "checkpoint__every": 2}
    whole, broken = make("whole", **options), make("broken", **options, resume="auto")
    run_until(alone(), str(whole.path))
    run_until(alone(), str(broken.path), stop_at=4)
    assert not broken.done.exists()
    run_until(alone(), str(broken.path))
    assert record(broken) == record(whole)


@pytest.mark.slow
def test_watching_looks_first(make: Any) -> None:
    """Validation and the anchors' health, of a model that looks by itself."""
    task = TASKS["mix"] | {"source": MIX}
    shown = {"eval__every": 2, "eval__tasks": {"mix": task}, "eval__limit": 4, "eval__batch_size": 3,
             "health__every": 2, "health__images": 3, "health__max_new_tokens": 3}  # fmt: skip
    plain, watched = make("plain", stage__max_steps=2), make("watched", stage__max_steps=2, **shown)
    for run in (plain, watched):
        rank.run_rank(run.read_config(), run, alone())
    assert losses(plain) == losses(watched)
    (look_of,) = lines(watched.health)
    assert look_of["images"] == 3
    assert all(0 < look_of[name] <= 1 for name in ("coverage", "patches_used", "connector_entropy"))
    assert lines(watched.evals)[0]["loss"] > 0


RAGGED = ["selector=correlation", "model.selector.low_layer=1", "tiling=grid_2x2_global",
          "model.selector.deep_layer=-1", "model.selector.tau=0.99", "data.max_length=512"]  # fmt: skip


def command_line(folder: Path, backbones: Path) -> list[str]:
    """Of a run on the world of three captions."""
    words = [word for word in write_world(folder, backbones) if "selector" not in word]
    return [*words, *RAGGED, f"data.feature_cache={folder}/features"]


def test_a_run_is_prepared_by_looking_first(tiny_backbones: Path, tmp_path: Path) -> None:
    words = command_line(tmp_path, tiny_backbones)
    with pytest.raises(UserError, match="depends on what the vision tower sees"):
        prepare(compose([*words, "run=none", "data.feature_cache=null"]), ["test"])
    assert not (tmp_path / "checkpoints").exists(), "refused before anything is assembled"
    run = prepare(compose([*words, "run=looked"]), ["test"])
    (counts,) = (tmp_path / "features").rglob("complete-*.npz")
    before = counts.read_bytes()
    counts.unlink()
    prepare(compose([*words, "run=looked", "resume=auto"]), ["test"])
    assert counts.read_bytes() == before
    assert loader_of(run)[0].mixture.tokens.min() > 5


@pytest.mark.slow
def test_from_the_command_line_to_scores(tiny_backbones: Path, tmp_path: Path) -> None:
    """Both doors in processes of their own: two ranks under ZeRO-2, then questions about the same images."""
    words = [*command_line(tmp_path, tiny_backbones), "run=real", "hardware.ranks=2", "stage.global_batch=2",
             "hardware.micro_batch=1", "stage.epochs=2"]  # fmt: skip
    subprocess.run([sys.executable, "-m", "train", "run", *words], check=True, timeout=600)
    run = tmp_path / "checkpoints" / "real"
    assert len(losses(RunFolder(run))) == 3
    asked = [{"image": f"{number}.png", "question": "what?", "answer": "a circle"} for number in range(3)]
    (tmp_path / "data" / "images" / "own.json").write_text(json.dumps(asked))
    subprocess.run(
        [sys.executable, "-m", "evals", f"model={run}", "task=custom", f"data={tmp_path}/data/images/own.json",
         f"data.cache_dir={tmp_path}/cache", f"data.feature_cache={tmp_path}/features"],
        check=True, timeout=600,
    )  # fmt: skip
    (result,) = [json.loads(path.read_text()) for path in (run / "evals").glob("*.json")]
    assert (result["n"], result["vision_features"]) == (3, "cached")
    assert result["visual_tokens_per_image"] >= 5


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_ranks_with_other_numbers_stay_in_step(pair: Ranks, make: Any, zero: int) -> None:
    """Ranks have rows of other lengths, and one of them text alone at times."""
    options = {"stage__max_steps": 3, "hardware__micro_batch": 1}
    one = make("one", FINETUNE, **options)
    cached_run(alone(), str(one.path))
    sharded = make("two", FINETUNE, **options, engine="deepspeed", zero__stage=zero, hardware__ranks=2)
    pair.run(cached_run, folder=str(sharded.path))
    assert losses(sharded) == pytest.approx(losses(one), rel=1e-4)
