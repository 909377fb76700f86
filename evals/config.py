"""The configuration of one evaluation as frozen dataclasses; imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from anchorformer.devices import Device, Precision
from anchorformer.errors import UserError
from anchorformer.schema import TARGET, Schema
from data.scan_config import TemplateName


class Condition(str, Enum):
    """What the model sees beside the question; the last two are the baselines that an accuracy is read against."""

    right = "right"
    shuffled = "shuffled"
    """Each question with another image of the same task."""
    none = "none"
    """The question without an image."""


@dataclass(frozen=True, kw_only=True)
class RecordsConfig(Schema):
    """Where the records lie."""

    root: str
    """Folder that relative paths of the tasks start from."""
    cache_dir: str = ".cache/data"
    """Where Arrow copies of the annotations are kept."""


@dataclass(frozen=True, kw_only=True)
class EvalDataConfig(RecordsConfig):
    """Where the records lie, and what is known of their images."""

    feature_cache: str | None = None
    """Folder of vision features that are computed once for all runs (`data.features`); null runs the tower live."""


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig(Schema):
    """Which questions there are."""

    tasks: dict[str, dict[str, Any]]
    """Name -> plug-in of `evals.tasks`."""
    data: RecordsConfig
    limit: int | None = None
    """So many questions of each task, spread evenly over it; null takes all."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError(
                "no task was named",
                found="tasks={}",
                expected="at least one name of conf/eval",
                remedy="add task=docvqa_val, or several as task=[docvqa_val,chartqa_test]",
            )
        self._check_counts("limit")

    def _check_counts(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(
                    f"{name} is too small",
                    found=value,
                    expected="1 or more",
                    remedy=f"set {name}=1, or more",
                )


@dataclass(frozen=True, kw_only=True)
class EvalConfig(QuestionsConfig):
    """Everything that decides an evaluation."""

    model: str
    """Run folder (its `model/` is taken) or model folder."""
    data: EvalDataConfig
    conditions: tuple[Condition, ...] = (Condition.right,)
    """Every task is run once per condition."""
    batch_size: int = 64
    """Questions answered together; in fp32 scores do not depend on it."""
    ranks: int = 1
    """Processes that share the questions, one per card or each with its part of the cores."""
    seed: int = 0
    """Decides which other image a question gets under `shuffled`."""
    template: TemplateName | None = None
    """Conversation template; null is the one the model was trained with."""
    device: Device = Device.auto
    precision: Precision = Precision.auto
    """`auto` is bf16 on CUDA and fp32 on CPU, where scores are then equal for every batch size."""
    selector: dict[str, Any] = field(default_factory=dict)
    """Plug-in of `anchorformer.selectors` that stands before the trained connector; the model's own where empty."""
    decoding: dict[str, Any] = field(default_factory=lambda: {TARGET: "anchorformer.decoding.greedy.GreedyConfig"})
    """Plug-in of `anchorformer.decoding`: how answers are generated."""
    variant: str | None = None
    """Name of an evaluation that is not the model's own; null is made of what is otherwise: `fastervlm-damro`."""
    out: str | None = None
    """Folder of the results; null is `evals` in the folder named by `model`, and of a variant its own one there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("batch_size", "ranks")
        if not self.conditions or len(set(self.conditions)) < len(self.conditions):
            raise UserError(
                "conditions must name each once",
                found=[condition.value for condition in self.conditions],
                expected="some of right, shuffled, none",
                remedy="e.g. conditions=[right,shuffled]",
            )
        if self.variant is not None and not re.fullmatch(r"\w[\w.-]*", self.variant):
            raise UserError(
                "the variant's name is no folder name", found=f"variant={self.variant}",
                expected="letters, digits, - _ .", remedy="e.g. variant=damro_4",
            )  # fmt: skip
        if self.data.feature_cache is not None and (self.selector or self.method != "greedy"):
            raise UserError(
                "the feature cache holds what the model's own selector reads", found=f"another {self.variant_name}",
                expected="the vision tower itself", remedy="leave out data.feature_cache",
            )  # fmt: skip

    @property
    def method(self) -> str:
        """The decoding, by the name of its file."""
        return _file_of(self.decoding)

    @property
    def variant_name(self) -> str | None:
        """What tells the evaluation from the model's own; None where it is that."""
        own = [_file_of(self.selector)] * bool(self.selector) + [self.method] * (self.method != "greedy")
        return self.variant or "-".join(own) or None


def _file_of(plugin: dict[str, Any]) -> str:
    return str(plugin.get(TARGET)).rpartition(".")[0].rpartition(".")[2]
