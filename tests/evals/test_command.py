"""The command line of evals: every shipped task composes, and every mistake is answered in plain words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from anchorformer.errors import UserError
from anchorformer.schema import parse_plugin
from data.folders import model_folder
from data.overrides import CONF
from evals.__main__ import compose_config, main
from evals.config import Condition
from evals.metrics.choice import letter_lmms
from evals.metrics.vqa_accuracy import LEAST, vqa_accuracy
from evals.prepare import prepare
from evals.submission import Outcome
from evals.tasks.base import PACKAGE, TaskConfig

COMMON = ["model=m", "data.root=r"]


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "eval").glob("*.yaml")))
def test_every_shipped_task_composes_and_parses(name: str) -> None:
    own = ["data=mine.jsonl"] if name == "custom" else []
    config = compose_config([*COMMON, f"task={name}", *own])
    task = parse_plugin(TaskConfig, config.tasks[name], PACKAGE, name)
    assert task.describe()["metric_variant"]
    assert config.conditions == (Condition.right,)


def test_several_tasks_and_a_value_of_one_of_them() -> None:
    config = compose_config(
        [*COMMON, "task=[docvqa_val,chartqa_test]", "conditions=[right,none]", "tasks.docvqa_val.max_new_tokens=7"]
    )
    assert list(config.tasks) == ["docvqa_val", "chartqa_test"]
    assert config.tasks["docvqa_val"]["max_new_tokens"] == 7
    assert config.conditions == (Condition.right, Condition.none)


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        ([], ["3 value(s) are missing", "model=", "task=", "data.root="]),
        (["task=docvqa_vla"], ["no task 'docvqa_vla'", "'docvqa_val' or"]),
        (["modle=m", "task=docvqa_val"], ["unknown key 'modle'", "'model'?"]),
        ([*COMMON, "task=docvqa_val", "+limt=3"], ["unknown key 'limt'", "'limit'?"]),
        ([*COMMON, "task=docvqa_val", "batch_size=many"], ["batch_size='many'", "integer"]),
        ([*COMMON, "task=docvqa_val", "batch_size=0"], ["batch_size is too small"]),
        ([*COMMON, "task=docvqa_val", "conditions=[left]"], ["conditions", "'left'"]),
        ([*COMMON, "task=custom"], ["tasks.custom.source.annotations=???"]),
        (["model"], ["cannot be read", "model=..."]),
        (["task=docvqa_val,chartqa_test"], ['"task=[docvqa_val,chartqa_test]"']),
        ([*COMMON, "task=docvqa_val", "conditions=rigth"], ["'rigth'", "'right', 'shuffled' or 'none'"]),
        ([*COMMON, "task=docvqa_val", "template=vicuna"], ["template='vicuna'", "'plain', 'v1' or 'chat'"]),
        (["--model", "m"], ["--model", "model=m, without dashes"]),
        (["model=a=b"], ["model=a=b", "in quotes"]),
    ],
)
def test_a_mistake_names_what_was_found_and_expected(overrides: list[str], fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        compose_config(overrides)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)
    assert not any(word in str(caught.value) for word in ("python -m train", "stage.template", "Exception"))


def test_one_condition_needs_no_brackets() -> None:
    assert compose_config([*COMMON, "task=docvqa_val", "conditions=shuffled"]).conditions == (Condition.shuffled,)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["task=docvqa_val", "-h"]])
def test_help_is_the_usage(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evals", *arguments])
    assert main() == 0
    shown = capsys.readouterr().out
    assert all(path.stem in shown for path in (CONF / "eval").glob("*.yaml"))
    assert all(word in shown for word in ("usage: python -m evals", "batch_size=64", "right,shuffled,none"))


def test_an_unknown_value_of_a_task_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    config = compose_config(["model=m", f"data.root={tmp_path}", "task=docvqa_val", "tasks.docvqa_val.max_new_token=7"])
    with pytest.raises(UserError, match="unknown key 'max_new_token'") as caught:
        prepare(config)
    assert caught.value.remedy == "correct tasks.docvqa_val on the command line or in conf/eval/docvqa_val.yaml"


def test_a_limit_is_spread_over_the_task(tmp_path: Path) -> None:
    rows = [{"question_id": n, "image": f"{n}.png", "question": "?", "answer": "a"} for n in range(10)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    base = ["model=m", f"data={tmp_path}/q.json", f"data.cache_dir={tmp_path}/cache", "task=custom"]
    for limit, expected in (
        ("3", ["0", "3", "6"]),
        ("10", [str(n) for n in range(10)]),
        ("99", [str(n) for n in range(10)]),
    ):
        prepared = prepare(compose_config([*base, f"limit={limit}"]))
        assert [item.id for item in prepared["custom"][1]] == expected


@pytest.mark.parametrize("folder", ["plain", "with spaces, commas = and 'quotes'"])
def test_questions_of_ones_own_in_two_short_words(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    rows = [{"image": "a.png", "question": "what?", "answer": ["a", "b"]}, {"image": "a.png", "question": "which?"}]
    (tmp_path / folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    words = ["model=m", "task=custom", f"data={tmp_path / folder / 'mine.jsonl'}", "metrics=[exact,anls,relaxed]"]
    config = compose_config([*words, f"data.cache_dir='{tmp_path}/cache'"])
    assert config.data.root == str(tmp_path / folder)
    ((task, questions),) = prepare(config).values()
    assert [item.references for item in questions] == [("a", "b"), ()]
    outcomes = [Outcome("b", 1.0), Outcome("x", None)]
    assert task.aggregate(questions, outcomes) == {"anls": 1.0, "relaxed_accuracy": 1.0}


@pytest.mark.parametrize("metrics", ["[vqa_accuracy]", "[exact,vqa_accuracy]"])
def test_too_few_answers_for_a_full_point_are_refused_when_they_are_read(tmp_path: Path, metrics: str) -> None:
    def read(*answers: list[str]) -> None:
        rows = [{"question_id": n, "image": "a.png", "question": "what?", "answer": a} for n, a in enumerate(answers)]
        (tmp_path / "mine.json").write_text(json.dumps(rows))
        words = ["model=m", "task=custom", f"data={tmp_path}/mine.json", f"metrics={metrics}"]
        prepare(compose_config([*words, f"data.cache_dir={tmp_path}/cache"]))

    for count in range(1, LEAST):
        assert vqa_accuracy("cat", ["cat"] * count) < 1
        with pytest.raises(UserError) as caught:
            read(["cat"] * LEAST, ["cat"] * count)
        assert all(word in str(caught.value) for word in (f"{count} answer", "4 or more", "exact_match", "record 1"))
    assert vqa_accuracy("cat", ["cat"] * LEAST) == 1
    read(["cat"] * LEAST, ["cat"] * 10, [])


def test_one_of_several_letters_is_right() -> None:
    assert [letter_lmms(said, ["A", "C"]) for said in ("A", "c", "C. a dog", "B")] == [1, 1, 1, 0]


def test_an_unknown_definition_of_a_metric_is_refused_with_the_ones_there_are(tmp_path: Path) -> None:
    words = ["model=m", f"data.root={tmp_path}", "task=docvqa_val", "tasks.docvqa_val.variant=official"]
    with pytest.raises(UserError, match=r"lmms_eval.*pix2struct.*llava"):
        prepare(compose_config(words))


def test_missing_files_are_named(tmp_path: Path) -> None:
    config = compose_config(["model=m", f"data.root={tmp_path}", "task=docvqa_val", f"data.cache_dir={tmp_path}"])
    with pytest.raises(UserError, match="val_v1"):
        prepare(config)


def test_the_model_of_a_run_or_the_folder_itself(tmp_path: Path) -> None:
    def found(folder: Path) -> Path:
        return model_folder(str(folder), "model", "config.json")

    run = tmp_path / "mine" / "finetune"
    (run / "model").mkdir(parents=True)
    with pytest.raises(UserError, match="no model in"):
        found(run)
    (run / "model" / "config.json").write_text("{}")
    assert found(run) == found(run / "model") == run / "model"
    with pytest.raises(UserError) as caught:
        found(run.parent)
    assert caught.value.remedy == f"pass model={run}"
    with pytest.raises(UserError, match="no such folder"):
        found(tmp_path / "absent")


def test_a_refused_command_has_loaded_neither_torch_nor_weights() -> None:
    script = (
        "import sys, json; from evals.__main__ import compose_config\n"
        f"compose_config({json.dumps([*COMMON, 'task=docvqa_val'])})\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=CONF.parent, check=False).returncode == 0


def test_a_user_mistake_leaves_with_2_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "evals", "task=docvqa_vla"], cwd=CONF.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in ("found:", "expected:", "remedy:"))
