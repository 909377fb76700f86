"""Steps as each rank sees them: order, resume, equal micro-batches, and what bad images and stale counts do."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anchorformer.contracts import Batch
from anchorformer.errors import UserError
from anchorformer.processing import AnchorFormerProcessor
from data.config import DataConfig
from data.loader import Loader


@dataclass(frozen=True)
class _Stage:
    global_batch: int = 4
    epochs: float | None = 2.0
    max_steps: int | None = None


@dataclass(frozen=True)
class _Hardware:
    micro_batch: int = 2


@dataclass(frozen=True)
class _Run:
    data: DataConfig
    stage: _Stage = _Stage()
    hardware: _Hardware = _Hardware()
    seed: int = 3


def _equal(left: list[list[Batch]], right: list[list[Batch]]) -> bool:
    def plain(steps: list[list[Batch]]) -> Any:
        return [
            [[value.tolist() if isinstance(value, torch.Tensor) else value
              for value in (getattr(batch, name) for name in batch.__slots__)] for batch in step]
            for step in steps
        ]  # fmt: skip

    return bool(plain(left) == plain(right))


def test_ranks_share_every_global_batch(filled: Any, processor: AnchorFormerProcessor) -> None:
    run = _Run(filled.config())
    loaders = [Loader(run, processor, rank, 2) for rank in range(2)]
    whole = Loader(run, processor, 0, 1)
    assert (whole.total_steps, whole.steps_per_epoch) == (6, 3)
    seen: list[str] = []
    for *parts, alone in zip(*loaders, whole, strict=True):
        assert len(parts[0]) == len(parts[1]) == 1
        ids = sorted(name for rank in parts for batch in rank for name in batch.sample_ids)
        assert ids == sorted(name for batch in alone for name in batch.sample_ids) == sorted(whole.sample_ids)
        assert loaders[0].sample_ids == loaders[1].sample_ids == whole.sample_ids
        assert loaders[0].state_dict() == loaders[1].state_dict() == whole.state_dict()
        seen += ids
    every = sorted(f"own/{index}" for index in range(12))
    assert sorted(seen[:12]) == sorted(seen[12:]) == every
    assert whole.state_dict() == {"seed": 3, "epoch": 2, "consumed": 0}


def test_ids_are_read_only_when_asked_for(
    filled: Any, processor: AnchorFormerProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(_Run(filled.config()), processor, 0, 2)
    assert loader.sample_ids == ()
    monkeypatch.setattr(loader.mixture, "sample_id", lambda _: pytest.fail("read for nothing"))
    steps = iter(loader)
    next(steps)
    monkeypatch.undo()
    assert len(set(loader.sample_ids)) == 4


def test_workers_change_nothing(filled: Any, processor: AnchorFormerProcessor) -> None:
    alone = list(Loader(_Run(filled.config()), processor, 0, 1))
    helped = list(Loader(_Run(filled.config(num_workers=2)), processor, 0, 1))
    assert len(alone) == 6
    assert _equal(alone, helped)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_goes_on_where_the_state_says(filled: Any, processor: AnchorFormerProcessor, workers: int) -> None:
    run = _Run(filled.config(num_workers=workers, token_budget=200), _Stage(global_batch=5, epochs=None, max_steps=7))
    whole = list(Loader(run, processor, 0, 1))
    first = Loader(run, processor, 0, 1)
    steps = iter(first)
    begun = [next(steps) for _ in range(3)]
    saved = json.loads(json.dumps(first.state_dict()))
    assert saved == {"seed": 3, "epoch": 1, "consumed": 3}, "prefetched steps are not counted"
    rest = Loader(_Run(filled.config(token_budget=200), run.stage), processor, 0, 1, state=saved)
    assert _equal(begun + list(rest), whole)
    with pytest.raises(UserError, match="saved position"):
        Loader(replace(run, seed=4), processor, 0, 1, state=saved)


def test_loading_leaves_the_global_generator_alone(filled: Any, processor: AnchorFormerProcessor) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    list(Loader(_Run(filled.config()), processor, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_token_budget_bounds_micro_batches(filled: Any, processor: AnchorFormerProcessor) -> None:
    run = _Run(filled.config(token_budget=70), hardware=_Hardware(micro_batch=4))
    loaders = [Loader(run, processor, rank, 2) for rank in range(2)]
    for parts in zip(*loaders, strict=True):
        assert len(parts[0]) == len(parts[1])
        assert all(batch.num_tokens <= 70 for rank in parts for batch in rank)
    with pytest.raises(UserError, match="token_budget") as caught:
        Loader(_Run(filled.config(token_budget=30)), processor, 0, 1)
    assert "the longest sample" in caught.value.expected


BAD = ("missing", "empty", "truncated", "text", "bomb")


@pytest.mark.parametrize("how", BAD)
def test_bad_image_is_an_error_with_path_and_id(filled: Any, processor: AnchorFormerProcessor, how: str) -> None:
    filled.spoil("4.png", how)
    with pytest.raises(UserError, match="own/4") as caught:
        list(Loader(_Run(filled.config()), processor, 0, 1))
    assert "4.png" in caught.value.what
    assert caught.value.remedy


def test_a_worker_s_error_is_the_user_s_error(filled: Any, processor: AnchorFormerProcessor) -> None:
    filled.spoil("4.png", "missing")
    with pytest.raises(UserError, match="own/4"):
        list(Loader(_Run(filled.config(num_workers=1)), processor, 0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_is_deterministic_and_counted(filled: Any, processor: AnchorFormerProcessor, workers: int) -> None:
    good = list(Loader(_Run(filled.config()), processor, 0, 1))
    for index, how in zip((0, 1, 3, 4, 6), BAD, strict=True):
        filled.spoil(f"{index}.png", how)
    bad = {f"own/{index}" for index in (0, 1, 3, 4, 6)}
    run = _Run(filled.config(on_bad_image="skip", max_dropped_share=0.42, num_workers=workers))
    skipped = list(Loader(run, processor, 0, 1))
    assert _equal(skipped, list(Loader(run, processor, 0, 1)))
    for step, whole in zip(skipped, good, strict=True):
        for batch, before in zip(step, whole, strict=True):
            assert batch.sample_ids == tuple(name for name in before.sample_ids if name not in bad)
            assert batch.num_skipped == len(before.sample_ids) - len(batch.sample_ids)
            assert batch.num_tokens >= 1
    assert sum(batch.num_skipped for step in skipped for batch in step) == 2 * len(bad)
    strict = replace(run, data=replace(run.data, max_dropped_share=0.2))
    with pytest.raises(UserError, match="skip too many"):
        list(Loader(strict, processor, 0, 1))
    with pytest.raises(UserError, match="skip too many"):
        list(Loader(run, processor, 0, 1, skipped=3))  # before the resumption, and they count


def test_a_micro_batch_of_bad_images_only_is_empty(corpus: Any, processor: AnchorFormerProcessor) -> None:
    corpus.add("gone", "gone.png")
    corpus.add("here")
    run = _Run(corpus.config(on_bad_image="skip", max_dropped_share=1.0), _Stage(2, 1.0), _Hardware(1))
    ((first, second),) = list(Loader(run, processor, 0, 1))
    empty, full = (first, second) if first.num_skipped else (second, first)
    assert (empty.sample_ids, empty.num_supervised, empty.num_tokens) == ((), 0, 1)
    assert full.sample_ids == ("own/here",)


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_link_out_of_the_root_is_never_skipped(
    corpus: Any, processor: AnchorFormerProcessor, tmp_path: Path, policy: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    corpus.image("../outside/secret.png")
    (corpus.root / "images").mkdir(exist_ok=True)
    (corpus.root / "images/link").symlink_to(outside)
    corpus.add("sly", "link/secret.png")
    config = corpus.config(on_bad_image=policy, max_dropped_share=1.0)
    run = _Run(config, _Stage(1, 1.0), _Hardware(1))
    with pytest.raises(UserError, match=r"own/sly.*outside its root") as caught:
        list(Loader(run, processor, 0, 1))
    assert "linked_roots" in caught.value.remedy
    allowed = {**corpus.write(), "linked_roots": [str(outside)]}
    run = replace(run, data=corpus.config(sources={"own": allowed}))
    assert len(list(Loader(run, processor, 0, 1))) == 1


def test_stale_counts_are_noticed(
    filled: Any, processor: AnchorFormerProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(_Run(filled.config()), processor, 0, 1)
    loader.mixture.tokens += 1
    with pytest.raises(UserError, match=r"not as long as it was counted"):
        list(loader)
