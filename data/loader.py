"""Optimizer steps as lists of micro-batches: mixture, sampler, processor and collation put together for one rank."""

from __future__ import annotations

import math
import signal
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from anchorformer.contracts import Batch, Example
from anchorformer.errors import UserError
from anchorformer.images import open_image
from data.collate import collate, make_filler
from data.config import DataConfig, OnBad
from data.encoder import Encoder, turns_of
from data.features import FeatureCache
from data.images import locate
from data.mixture import Mixture
from data.sampler import Sampler, SamplerState, plan_step


class StageLike(Protocol):
    """The part of the stage's config that is read here (`train` may not be imported)."""

    @property
    def global_batch(self) -> int: ...
    @property
    def epochs(self) -> float | None: ...
    @property
    def max_steps(self) -> int | None: ...


class HardwareLike(Protocol):
    @property
    def micro_batch(self) -> int: ...


class RunLike(Protocol):
    """The part of `RunConfig` that is read here."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def stage(self) -> StageLike: ...
    @property
    def hardware(self) -> HardwareLike: ...
    @property
    def seed(self) -> int: ...


def num_steps(stage: StageLike, num_samples: int) -> int:
    """Optimizer steps of a whole run.

    Args:
        num_samples: of an epoch.
    """
    return stage.max_steps or math.ceil((stage.epochs or 0) * num_samples / stage.global_batch)


class Loader:
    """Iterates over the remaining steps of a run; each item is all micro-batches of one optimizer step of this rank.

    All ranks yield equally many micro-batches in every step. Which samples a step holds depends on the mixture, the
    global batch and the sampler's state only, never on ranks or workers; nothing here draws from a global generator.

    Args:
        state: `state_dict()` of an earlier loader; null starts at the beginning.
        pin_memory: page-locked batches, for copies to a CUDA device that overlap with computing.
        skipped: samples that all ranks together have skipped before `state`, for the ceiling of the whole run.
        features: filled with what the vision tower says of every tile; batches bring it along.

    Attributes:
        total_steps: optimizer steps of the whole run, those before `state` counted.
        steps_per_epoch: optimizer steps that touch one epoch, rounded up.

    Raises:
        UserError: what `Mixture` and `Sampler.restore` raise, and a token budget below the longest sample. While
            iterating: a bad image under `on_bad_image=error`, or more skipped samples than `max_dropped_share`.
    """

    def __init__(
        self,
        config: RunLike,
        processor: Encoder,
        rank: int,
        world_size: int,
        state: Mapping[str, int] | None = None,
        pin_memory: bool = False,
        features: FeatureCache | None = None,
        skipped: int = 0,
    ) -> None:
        self.config, self.rank, self.world_size, self._pin_memory = config.data, rank, world_size, pin_memory
        self.mixture = Mixture(config.data, processor, features)
        budget = config.data.token_budget
        if budget is not None and self.mixture.tokens.max() > budget:
            raise UserError(
                "data.token_budget is smaller than a sample",
                found=budget,
                expected=f"at least {self.mixture.tokens.max()}, the longest sample",
                remedy="raise data.token_budget, or lower data.max_length with data.overlength=drop or truncate_answer",
            )
        stage = config.stage
        self._sampler = Sampler(self.mixture.epoch, len(self.mixture), stage.global_batch)
        self._state = SamplerState(config.seed) if state is None else self._sampler.restore(state, config.seed)
        self._micro_batch = config.hardware.micro_batch
        self.steps_per_epoch = math.ceil(len(self.mixture) / stage.global_batch)
        self.total_steps = num_steps(stage, len(self.mixture))
        self._numbers: tuple[int, ...] = ()
        self._most_skipped = config.data.max_dropped_share * self.total_steps * stage.global_batch / world_size
        self._skipped_before = skipped / world_size
        self._assembly = _Assembly(self.mixture, processor, config.data, features)

    def state_dict(self) -> dict[str, int]:
        """Position after the step yielded last: epoch, consumed and seed."""
        return self._state.to_dict()

    @property
    def data_fingerprint(self) -> dict[str, str]:
        """What the samples are made of, by name; equal wherever a position in the data means the same samples."""
        return self.mixture.data_fingerprint

    @property
    def order_digest(self) -> str:
        """Hash of the order in which the whole run takes its samples, those before `state` counted."""
        return self._sampler.digest(self._state.seed, self.total_steps)

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Ids of the step yielded last, over all ranks, in the sampler's order; read from disk when asked for."""
        return tuple(self.mixture.sample_id(number) for number in self._numbers)

    def __iter__(self) -> Iterator[list[Batch]]:
        remaining = self.total_steps - self._sampler.steps_before(self._state)
        planned: deque[_Step] = deque()
        results = iter(
            DataLoader(
                self._assembly,
                batch_size=None,
                sampler=self._plans(self._state, remaining, planned),
                num_workers=self.config.num_workers,
                pin_memory=self._pin_memory,
                worker_init_fn=_take_signals_like_the_parent,
                # A generator of its own: torch would draw the workers' base seed from the global one.
                generator=torch.Generator().manual_seed(self._state.seed),
            )
        )
        skipped = self._skipped_before
        for _ in range(remaining):
            batches = [_unwrap(next(results))]
            step = planned.popleft()
            batches += [_unwrap(next(results)) for _ in range(step.micro_batches - 1)]
            skipped += sum(batch.num_skipped for batch in batches)
            if skipped > self._most_skipped:
                raise UserError(
                    f"rank {self.rank} had to skip too many samples for their images",
                    found=f"{skipped:g}",
                    expected=f"at most {self._most_skipped:g}, data.max_dropped_share={self.config.max_dropped_share} "
                    "of its samples of the whole run",
                    remedy="list the bad images with `python -m data scan`, and mend or remove them",
                )
            self._state, self._numbers = step.after, step.numbers
            yield batches

    def _plans(self, state: SamplerState, steps: int, planned: deque[_Step]) -> Iterator[tuple[int, ...]]:
        """Record numbers of this rank's micro-batches, step after step; runs ahead of the steps that are yielded."""
        for _ in range(steps):
            numbers = self._sampler.batch(state)
            plan = plan_step(
                self.mixture.tokens[numbers].tolist(), self.world_size, self._micro_batch, self.config.token_budget
            )[self.rank]
            state = self._sampler.after(state)
            planned.append(_Step(len(plan), state, tuple(numbers.tolist())))
            yield from (tuple(numbers[places].tolist()) for places in plan)


@dataclass(frozen=True, slots=True)
class _Step:
    micro_batches: int
    after: SamplerState
    numbers: tuple[int, ...]


class _Assembly(Dataset[Batch | UserError]):
    """From the record numbers of a micro-batch to the micro-batch; the part that runs in the loader's processes.

    A user's mistake is returned, not raised: torch would turn it into a RuntimeError with a worker's traceback.
    """

    def __init__(self, mixture: Mixture, processor: Encoder, config: DataConfig, features: FeatureCache | None) -> None:
        self._mixture, self._processor, self._config, self._features = mixture, processor, config, features
        self._filler = make_filler(processor)

    def __getitem__(self, numbers: tuple[int, ...]) -> Batch | UserError:
        try:
            examples = [self._encode(number) for number in numbers]
            kept = [example for example in examples if example is not None]
            batch = collate(kept, self._filler, num_skipped=len(examples) - len(kept))
            return batch if self._features is None else _with_features(batch, self._features)
        except UserError as error:
            return error

    def _encode(self, number: int) -> Example | None:
        """The record as an example, or None where an image is bad and `on_bad_image=skip`."""
        record = self._mixture[number]
        images = []
        for ref in record.images:
            try:
                place = locate(ref)
            except UserError as error:
                raise _of_sample(record.id, error) from None
            try:
                images.append(open_image(place, name=str(ref.path or "an image")))
            except UserError as error:
                if self._config.on_bad_image is OnBad.skip:
                    return None
                raise _of_sample(record.id, error) from None
        example = self._processor.encode(
            turns_of(record),
            images,
            sample_id=record.id,
            max_length=self._config.max_length,
            overlength=self._config.overlength.value,
            token_counts=record.token_counts,
        )
        planned = int(self._mixture.tokens[number])
        if example.input_ids_S.numel() != planned:
            raise UserError(
                f"sample {record.id} is not as long as it was counted",
                found=f"{example.input_ids_S.numel()} positions",
                expected=f"{planned}, from the table in {self._config.cache_dir}",
                remedy="the text rules have changed since; remove the *.lengths.npy files in that folder",
            )
        return example


def _with_features(batch: Batch, cache: FeatureCache) -> Batch:
    """
    Raises:
        UserError: other tokens are chosen of a tile than its text was laid out for; and what the cache raises.
    """
    features = cache.read(batch.tiles_B3HW)
    if features.num_chosen != batch.token_counts:
        raise UserError(
            f"images of {', '.join(batch.sample_ids)} do not have as many embeddings as were counted",
            found=f"{features.num_chosen} in the feature cache", expected=f"{batch.token_counts}, one for each tile",
            remedy=f"remove {cache.folder}/complete-* and start again: what is there is counted anew",
        )  # fmt: skip
    return replace(batch, features=features)


def _take_signals_like_the_parent(_: int) -> None:
    """torch has SIGTERM end the loader's processes; a rank that goes on to its next step's border still needs them."""
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


def _of_sample(sample_id: str, error: UserError) -> UserError:
    return UserError(
        f"sample {sample_id}: {error.what}", found=error.found, expected=error.expected, remedy=error.remedy
    )


def _unwrap(result: Batch | UserError) -> Batch:
    if isinstance(result, UserError):
        raise result
    return result
