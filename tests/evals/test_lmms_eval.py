"""The plug-in inside lmms-eval itself: its answers and scores are the native ones (`make test-harness`)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from anchorformer.schema import parse_plugin
from data.record import ImageRef
from evals.config import EvalConfig, EvalDataConfig
from evals.harness.writing import write_task
from evals.metrics import MetricName
from evals.prepare import prepare
from evals.questions import Question
from evals.respondent import ModelRespondent, load
from evals.runner import evaluate
from evals.tasks.base import PACKAGE, AnswerTask, TaskConfig
from evals.tasks.mme import MmeTask
from evals.tasks.pope import PopeTask
from evals.tasks.vqa import VqaTask

pytest.importorskip("lmms_eval", reason="lmms-eval is an extra with a venv of its own: make test-harness")

from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

from anchorformer.harness.model import AnchorFormerChat, AnchorFormerSimple

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("red", "blue", "how many bars", "total?", "what is the value of the tallest one", "where is the star")
COUNT = 12


def tasks() -> dict[str, Any]:
    """DocVQA val and ChartQA test as shipped; answers of a few tokens."""
    return {
        name: {**yaml.safe_load((ROOT / "conf" / "eval" / f"{name}.yaml").read_text()), "max_new_tokens": 8}
        for name in ("docvqa_val", "chartqa_test")
    }


def write_world(root: Path, answers: Sequence[str]) -> None:
    """Both benchmarks in their published layouts, with these answers in turn."""
    documents, charts = root / "docvqa" / "documents", root / "chartqa" / "ChartQA Dataset" / "test"
    for folder in (documents, charts / "png"):
        folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for number in range(COUNT):
        side = 28 + 9 * (number % 3)
        for folder in (documents, charts / "png"):
            Image.frombytes("RGB", (side, 28), rng.randbytes(3 * side * 28)).save(folder / f"{number}.png")
    asked = [WORDS[number % len(WORDS)] + "?" * (number // len(WORDS)) for number in range(COUNT)]
    docs = [
        {"questionId": n, "question": text, "image": f"documents/{n}.png", "answers": [answers[n], "nothing"]}
        for n, text in enumerate(asked)
    ]
    (root / "docvqa" / "val_v1.0.json").write_text(json.dumps({"data": docs}))
    for kind, part in (("human", range(0, COUNT, 2)), ("augmented", range(1, COUNT, 2))):
        rows = [{"imgname": f"{n}.png", "query": asked[n], "label": answers[COUNT + n]} for n in part]
        (charts / f"test_{kind}.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def respondent(tiny_folder: Path) -> ModelRespondent:
    return load(tiny_folder, EvalConfig(model=str(tiny_folder), tasks=tasks(), data=EvalDataConfig(root="r")))


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, respondent: ModelRespondent) -> dict[str, Any]:
    """Scores and predictions of the native evaluation, some right, some nearly, some wrong; and the harness's files."""
    root = tmp_path_factory.mktemp("world")
    cache = str(tmp_path_factory.mktemp("cache"))
    config = EvalConfig(model="m", tasks=tasks(), data=EvalDataConfig(root=str(root), cache_dir=cache))
    write_world(root, ["x"] * (2 * COUNT))
    said = {
        item.id: answer
        for task, asked in prepare(config).values()
        for item, answer in zip(asked, respondent.answers(asked, 8), strict=True)
    }
    keys = [str(n) for n in range(COUNT)]
    keys += [f"test-{'human' if n % 2 == 0 else 'augmented'}-{n // 2}" for n in range(COUNT)]
    spoilt = (lambda text: text, lambda text: text[:-1] + "#", lambda text: "other")
    write_world(root, [spoilt[n % 3](said[key]) or "-" for n, key in enumerate(keys)])
    out, files = tmp_path_factory.mktemp("native"), tmp_path_factory.mktemp("files")
    prepared = prepare(config)
    found = {result["task"]: result for result in evaluate(config, prepared, respondent, {}, out)}
    for name, (task, asked) in prepared.items():
        write_task(name, task, asked, files)
    rows = {name: [json.loads(line) for line in (out / f"{name}-right.jsonl").open()] for name in prepared}
    return {"scores": found, "rows": rows, "files": files, "cache": cache}


def run(files: Path, names: Sequence[str], model: Any, **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(files), include_defaults=False)
    chosen = [f"local_{name}" for name in names]
    found = simple_evaluate(
        model=model, tasks=chosen, task_manager=manager, log_samples=True, device="cpu", bootstrap_iters=0, **options
    )
    return dict(found)


def test_the_plug_in_is_found_in_both_forms() -> None:
    assert get_model("anchorformer") is AnchorFormerChat
    assert get_model("anchorformer", force_simple=True) is AnchorFormerSimple


@pytest.mark.parametrize(("simple", "batch"), [(False, 1), (False, 5), (True, 4)])
def test_scores_and_answers_are_the_native_ones(
    native: dict[str, Any], tiny_folder: Path, simple: bool, batch: int
) -> None:
    found = run(
        native["files"], list(native["rows"]), "anchorformer", model_args=f"pretrained={tiny_folder}",
        batch_size=batch, force_simple=simple,
    )  # fmt: skip
    for name, metric in (("docvqa_val", "anls"), ("chartqa_test", "relaxed_overall")):
        score = native["scores"][name]["score"]
        assert 0 < score < 1
        assert found["results"][f"local_{name}"][f"{metric},none"] == pytest.approx(score, abs=1e-12)
        samples = sorted(found["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
        assert [sample["filtered_resps"][0] for sample in samples] == [
            row["prediction"] for row in native["rows"][name]
        ]
        assert [sample[metric] for sample in samples] == [row["score"] for row in native["rows"][name]]
    groups = native["scores"]["chartqa_test"]["groups"]
    for kind in ("human", "augmented"):
        found_part = found["results"]["local_chartqa_test"][f"relaxed_{kind}_split,none"]
        assert found_part == pytest.approx(groups[kind]["score"])


class Scripted(lmms):
    """Says what it is told to."""

    is_simple = True

    def __init__(self, answers: Sequence[str]) -> None:
        super().__init__()
        self.answers, self.device = list(answers), "cpu"

    def generate_until(self, requests: Any) -> list[str]:
        return [self.answers[request.args[3]] for request in requests]

    def loglikelihood(self, requests: Any) -> Any:
        raise NotImplementedError

    generate_until_multi_round = loglikelihood


class Says:
    def __init__(self, answers: Sequence[str]) -> None:
        self._answers = list(answers)

    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        return self._answers

    def answer_losses(self, questions: Sequence[Question]) -> list[tuple[float, int]]:
        raise NotImplementedError


YES_NO = ("yes", "no", "Yes", "no", "yes.", "maybe", "No", "yes")
CASES = {
    "gqa": (VqaTask(source={}, metric=MetricName.exact_match), ("red", "blue"), ("Red.", "blue", "a red", "red"),
            "exact_match"),
    "sqa": (VqaTask(source={}, metric=MetricName.choice), ("A", "B"), ("a", "B. dog", "C", "A"), "exact_match"),
    "textvqa": (VqaTask(source={}, metric=MetricName.vqa_accuracy), ("two", "no"), ("2", "yes", "no", "No!"),
                "exact_match"),
    "pope": (PopeTask(source={}, variant="lmms_eval"), ("yes", "no"), YES_NO, "pope_accuracy"),
    "mme": (MmeTask(source={}), ("yes", "no"), YES_NO, "mme_perception_score"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_other_scores_are_native_ones_by_the_variant_they_name(name: str, tmp_path: Path) -> None:
    task, labels, answers, metric = CASES[name]
    assert isinstance(task, AnswerTask)
    several = 10 if name == "textvqa" else 1
    asked = [
        Question(
            str(n), (("user", f"What {n}?"),), (),
            (labels[n % 2],) * (several - n % several) + ("other",) * (n % several),
            {"kind": "existence", "image": str(n // 2)},
        )
        for n in range(len(answers))
    ]  # fmt: skip
    outcomes = task.answer(asked, Says(answers))
    write_task(name, task, asked, tmp_path)
    found = run(tmp_path, [name], Scripted(answers))["results"][f"local_{name}"]
    wanted = sum(outcome.score or 0 for outcome in outcomes) / len(outcomes)
    aggregate = task.aggregate(asked, outcomes)
    assert 0 < wanted < 1
    if name == "mme":
        wanted = aggregate["perception"]
    assert found[f"{metric},none"] == pytest.approx(wanted)
    if name == "pope":
        for rate in ("precision", "recall"):
            assert found[f"pope_{rate},none"] == pytest.approx(aggregate["existence"][rate])
        assert found["pope_f1_score,none"] == pytest.approx(aggregate["existence"]["f1"])


def request(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def model(cls: type[AnchorFormerSimple], folder: Path, documents: Sequence[Any], batch: int = 3) -> AnchorFormerSimple:
    made = cls(pretrained=str(folder), device="cpu", batch_size=batch)
    made.task_dict = {"t": {"test": list(documents)}}
    return made


def pictures(count: int) -> list[Image.Image]:
    rng = random.Random(5)
    return [Image.frombytes("RGB", (28, 28), rng.randbytes(3 * 28 * 28)) for _ in range(count)]


def test_requests_are_answered_in_their_order_whatever_their_decoding(tiny_folder: Path) -> None:
    documents = pictures(6)
    kwargs = [{"max_new_tokens": 4 + 4 * (n % 2), "until": [], "image_aspect_ratio": "pad"} for n in range(6)]
    asked = [request(WORDS[n], kwargs[n], lambda doc: [doc], n, "t", "test") for n in range(6)]
    found = model(AnchorFormerSimple, tiny_folder, documents).generate_until(asked)
    alone = [model(AnchorFormerSimple, tiny_folder, documents, 1).generate_until([each])[0] for each in asked]
    assert found == alone
    assert len(set(found)) > 1
    for each, text in zip(asked, alone, strict=True):
        end = text[len(text) // 2] if text else "x"
        each.args[1]["until"] = [end, "never said"]
        stopped = model(AnchorFormerSimple, tiny_folder, documents).generate_until([each])[0]
        assert stopped == text.partition(end)[0].strip()


def test_losses_are_those_of_the_native_reading(tiny_folder: Path, respondent: ModelRespondent, tmp_path: Path) -> None:
    documents = pictures(5)
    targets = ["red", "a blue star", "8", "total", "how many"]
    asked = [
        request(WORDS[n], (lambda doc: targets[documents.index(doc)]) if n % 2 else targets[n], lambda doc: [doc], n,
                "t", "test")
        for n in range(5)
    ]  # fmt: skip
    found = model(AnchorFormerSimple, tiny_folder, documents).loglikelihood(asked)
    questions = []
    for n, image in enumerate(documents):
        image.save(tmp_path / f"{n}.png")
        ref = ImageRef(path=tmp_path / f"{n}.png")
        questions.append(Question(str(n), (("user", f"<image>\n{WORDS[n]}"),), (ref,), (targets[n],), {}))
    for (loss, _), (total, count) in zip(found, respondent.answer_losses(questions), strict=True):
        assert loss == pytest.approx(total / count, abs=1e-4)
    assert not any(is_greedy for _, is_greedy in found)


@pytest.mark.parametrize("cls", [AnchorFormerSimple, AnchorFormerChat])
def test_rounds_go_on_until_the_task_ends_them(tiny_folder: Path, cls: type[AnchorFormerSimple]) -> None:
    documents, options = pictures(4), {"max_new_tokens": 4}

    def to_text(doc: Any, *, previous_output: list[str], round_idx: int, previous_round_info: Any) -> Any:
        is_over = round_idx > documents.index(doc)
        return (
            [doc],
            f"{WORDS[round_idx]} {previous_output[-1]}",
            is_over,
            previous_output,
            (previous_round_info or 0) + 1,
        )

    def to_messages(doc: Any, *, round_idx: int | None = None, **others: Any) -> Any:
        visuals, text, is_over, said, memory = ([doc], WORDS[0], False, [], None) if round_idx is None else to_text(
            doc, round_idx=round_idx, **others)  # fmt: skip
        content = [{"type": "image", "url": visuals[0]}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        return messages if round_idx is None else (messages, is_over, said, memory)

    if cls is AnchorFormerChat:
        asked = [request("", to_messages, options, n, "t", "test") for n in range(4)]
    else:
        asked = [request(WORDS[0], options, lambda doc: [doc], to_text, n, "t", "test") for n in range(4)]
    found = model(cls, tiny_folder, documents).generate_until_multi_round(asked)
    assert [len(said) for said in found] == [1, 2, 3, 4]
    assert found == [model(cls, tiny_folder, documents, 1).generate_until_multi_round([each])[0] for each in asked]


@pytest.mark.slow
def test_two_processes_share_the_questions(native: dict[str, Any], tiny_folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "-m", "lmms_eval",
        "--model=anchorformer", f"--model_args=pretrained={tiny_folder}", f"--include_path={native['files']}",
        "--tasks=local_docvqa_val", "--batch_size=2", "--device=cpu", "--log_samples", f"--output_path={tmp_path}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = tmp_path.rglob("*_results.json")
    score = json.loads(result.read_text())["results"]["local_docvqa_val"]["anls,none"]
    assert score == pytest.approx(native["scores"]["docvqa_val"]["score"], abs=1e-12)
    (samples,) = tmp_path.rglob("*_samples_*.jsonl")
    assert len(samples.read_text().splitlines()) == COUNT


def test_the_native_tasks_that_are_compared_are_the_shipped_ones() -> None:
    for name, spec in tasks().items():
        assert parse_plugin(TaskConfig, spec, PACKAGE, name).describe()["variant"] == "lmms_eval"
