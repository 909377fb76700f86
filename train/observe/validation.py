"""Validation while a run trains: losses and scores of held-out questions, shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from anchorformer.schema import parse_plugin
from evals.questions import Question
from evals.respondent import ModelRespondent
from evals.results import summarise
from evals.tasks.base import PACKAGE, AnswerTask, TaskConfig
from train.choices import EngineName
from train.config import RunConfig
from train.distributed import World
from train.faults.progress import Phase, Progress

T = TypeVar("T")


def open_tasks(config: RunConfig) -> dict[str, tuple[TaskConfig, list[Question]]]:
    """The tasks of the run's validation, and the questions that each of them asks every time.

    Raises:
        UserError: a task that does not fit its class, files missing or not in their layout, a task without records.
    """
    opened = {}
    for name, spec in config.eval.tasks.items():
        place = f"eval.tasks.{name}"
        task = parse_plugin(TaskConfig, spec, PACKAGE, place, f"correct {place}, or conf/eval/{name}.yaml")
        data = config.data
        opened[name] = (task, task.questions(name, Path(data.root), Path(data.cache_dir), config.eval.limit))
    return opened


class Validation:
    """The questions of all tasks, the same at every validation."""

    def __init__(self, config: RunConfig, world: World) -> None:
        # From one rank: the others might see another state of a shared folder, and would then ask something else.
        self._tasks = world.broadcast(open_tasks(config) if world.is_main else {})

    def run(self, step: int, respondent: SharedRespondent) -> Iterator[dict[str, Any]]:
        """The records of one validation: a loss for each task that has right answers, a score for each that generates.

        Losses are means over supervised tokens, in nats, of each question's first reference.
        """
        for name, (task, questions) in self._tasks.items():
            answered = [item for item in questions if item.references]
            if answered:
                losses = respondent.answer_losses(answered)
                tokens = sum(count for _, count in losses)
                yield {"step": step, "dataset": name, "loss": sum(loss for loss, _ in losses) / max(tokens, 1)}
            if isinstance(task, AnswerTask) and answered:
                outcomes = task.answer(answered, respondent)
                summary = summarise(outcomes, [task.group(item) for item in answered])
                yield {"step": step, "task": name, "metric": task.metric.value, **summary}


class SharedRespondent:
    """The model in training, as tasks see it: each rank answers its share, and every rank has all answers.

    Under ZeRO-3 a forward pass is a collective, so all ranks make equally many: shares are filled up with questions
    that are asked already, questions with and without an image are taken apart (without one the vision tower does not
    run), and no rank leaves a generation before all have their answers.

    Attributes:
        own: what this rank asks by itself; under ZeRO-3 all ranks have to ask it the same.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int, world: World, progress: Progress,
                 *, is_sharded: bool) -> None:  # fmt: skip
        self._world, self._progress, self._batch_size = world, progress, batch_size
        self.own = ModelRespondent(model, processor, batch_size, {}, among_ranks=is_sharded and world.size > 1)

    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Greedy answers, in the order of the questions."""
        return self._share(questions, lambda part: self.own.answers(part, max_new_tokens))

    def answer_losses(self, questions: Sequence[Question]) -> list[tuple[float, int]]:
        """Summed negative log likelihood (nats) and number of supervised tokens of each first reference."""
        return self._share(questions, self.own.answer_losses)

    def _share(self, questions: Sequence[Question], ask: Callable[[Sequence[Question]], list[T]]) -> list[T]:
        world, found = self._world, dict[int, T]()
        for has_image in (True, False):
            numbers = [number for number, item in enumerate(questions) if bool(item.images) is has_image]
            dealt = numbers + numbers[:1] * (-len(numbers) % world.size)
            mine = dealt[world.rank :: world.size]
            given: list[T] = []
            for start in range(0, len(mine), self._batch_size):
                # Entered again for each batch: what the watchdog limits is one of them.
                self._progress.enter(Phase.show)
                given += ask([questions[number] for number in mine[start : start + self._batch_size]])
            for rank, values in enumerate(world.gather(given)):
                found |= zip(dealt[rank :: world.size], values, strict=True)
        return [found[number] for number in range(len(questions))]


def is_sharded(config: RunConfig) -> bool:
    """Whether a forward pass of this run is a collective."""
    return config.engine is EngineName.deepspeed and config.zero.stage == 3


@contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and afterwards in the mode that it was in.

    Random numbers need no restoring: every step draws them anew from its own number (`train.trainer.seed_step`).
    """
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)
