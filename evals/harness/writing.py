"""Changes when lmms-eval's local task files do: the questions of one task, their images, and the YAML beside them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from anchorformer.dialogue import PLACEHOLDER
from anchorformer.errors import UserError
from data.choices import LETTERS
from data.images import locate
from data.record import ImageRef
from evals.metrics import MetricName
from evals.questions import Question
from evals.tasks.base import AnswerTask, TaskConfig

PREFIX = "local_"
"""In front of the names of tasks, which are those of lmms-eval's own."""
SCORES = Path(__file__).with_name("scores")
SEVERAL = (MetricName.anls, MetricName.exact_match, MetricName.vqa_accuracy)
"""Metrics that lmms-eval compares with more than one reference."""
IMAGES = "images"
"""Folder of images that are not files where they come from."""

DESCRIPTION = """\
task: {prefix}{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function anchorformer.harness.documents.to_visual
doc_to_text: !function anchorformer.harness.documents.to_text
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
  until: []  # as the native evaluation; left out, lmms-eval ends answers at an empty line
{scores}metadata:
  - version: 0.0
"""


def write_task(name: str, task: TaskConfig, questions: Sequence[Question], out: Path) -> str:
    """Writes `<name>.jsonl` and then `<name>.yaml`, each complete or absent.

    Returns:
        The name under which lmms-eval knows the task.

    Raises:
        UserError: the task scores no answers, a question has no reference or more of them than lmms-eval compares with,
            is a conversation, has its images elsewhere than in front, or its image is missing.
    """
    if not isinstance(task, AnswerTask):
        raise UserError(
            f"task {name} has no form in lmms-eval", found=type(task).__name__, expected="a task that scores answers",
            remedy="run it with `python -m evals`",
        )  # fmt: skip
    rows = [_row(name, task.metric, item, out / IMAGES) for item in questions]
    out.mkdir(parents=True, exist_ok=True)
    _replace(out / f"{name}.jsonl", (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    scores = (SCORES / f"{task.metric.value}.yaml").read_text("utf-8")
    values = {"prefix": PREFIX, "name": name, "max_new_tokens": task.max_new_tokens, "scores": scores}
    _replace(out / f"{name}.yaml", [DESCRIPTION.format(**values)])
    return PREFIX + name


def _row(name: str, metric: MetricName, item: Question, images: Path) -> dict[str, Any]:
    """The columns that lmms-eval's own scores read of their data sets."""
    count = len(item.references)
    if not count or (count > 1 and metric not in SEVERAL):
        raise UserError(
            f"task {name}: question {item.id} cannot be scored by lmms-eval", found=f"{count} reference(s)",
            expected="one or more" if metric in SEVERAL else f"one, for {metric.value}",
            remedy="take a split whose answers are published, or run it with `python -m evals`",
        )  # fmt: skip
    kind = item.meta.get("kind", "")
    is_choice = metric is MetricName.choice
    return {
        "question_id": item.meta["image"] if metric is MetricName.mme else item.id,  # MME pairs questions by image
        "question": _text(name, item),
        "images": [str(_file(ref, images)) for ref in item.images],
        "answers": list(item.references),
        "answer": LETTERS.index(item.references[0]) if is_choice else item.references[0],
        "choices": list(LETTERS) if is_choice else [],
        "category": kind,
        "type": f"{kind}_test",
    }


def _text(name: str, item: Question) -> str:
    """What is asked, without the placeholders in front, which every model puts there in its own way."""
    front = f"{PLACEHOLDER}\n" * len(item.images)
    (_, text), *more = item.turns
    if more or not text.startswith(front) or PLACEHOLDER in text.removeprefix(front):
        raise UserError(
            f"task {name}: question {item.id} has no form in lmms-eval",
            found=f"{len(item.turns)} turn(s), {len(item.images)} image(s), {text[:60]!r}",
            expected="one turn, with its images in front of the text", remedy="run it with `python -m evals`",
        )  # fmt: skip
    return text.removeprefix(front)


def _file(ref: ImageRef, images: Path) -> Path:
    """The image as a file; one that comes out of a table is written."""
    source = locate(ref)
    if isinstance(source, Path):
        if not source.is_file():
            raise UserError(
                f"{source}: no such image", found="no file", expected="an image", remedy="fetch the images of this task"
            )
        return source
    path = images.absolute() / hashlib.sha256(source).hexdigest()
    if not path.is_file():
        images.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        beside.write_bytes(source)
        beside.replace(path)
    return path


def _replace(path: Path, lines: Iterable[str]) -> None:
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
