"""What is kept of where a run came from, and that no secret is: in its folder, its logs and its black boxes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from train import rank
from train.faults.black_box import BlackBox
from train.faults.guards import TrainingHalted
from train.faults.progress import Progress
from train.run import environment
from train.run.folder import RunFolder


def test_the_environment_keeps_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WANDB_API_KEY": "s3cret", "HF_TOKEN": "s3cret", "http_proxy": "http://me:s3cret@proxy:80",
        "NCCL_DEBUG": "WARN", "SLURM_JOB_ID": "7", "HOME_MADE": "s3cret",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    facts = environment.facts(["train", "log.api_key=s3cret", "data.root=https://me:s3cret@host/data", "seed=1"])
    assert "s3cret" not in json.dumps(facts)
    assert facts["variables"]["NCCL_DEBUG"] == "WARN"
    assert facts["variables"]["http_proxy"] == "http://***@proxy:80"
    assert facts["command"] == ["train", "log.api_key=***", "data.root=https://***@host/data", "seed=1"]
    assert len(facts["code"]) == 64


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "SSH_AUTH_SOCK", "XAUTHORITY"])
def test_a_message_may_name_the_working_directory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/home/me/project")
    monkeypatch.setenv("DB_PWD", "s3cret-word")
    message = "saved /home/me/project/checkpoints with s3cret-word"
    assert environment.mask_values(message) == "saved /home/me/project/checkpoints with ***"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("SLURM_JWT", "s3cret", "***"),
        ("HF_PAT", "s3cret", "***"),
        ("WANDB_SOMETHING_NEW", "s3cret", "***"),
        ("HTTP_PROXY", "me:s3cret@proxy:80", "***@proxy:80"),
        ("https_proxy", "http://me:s3@cret@proxy:80", "http://***@proxy:80"),
        ("HF_ENDPOINT", "https://host/x?sig=s3cret&token=s3cret", "https://host/x?***"),
        ("TOKENIZERS_PARALLELISM", "false", "false"),
        ("SLURM_JOB_ID", "7", "7"),
        ("LD_LIBRARY_PATH", "/usr/lib:/opt/python@3.11/lib", "/usr/lib:/opt/python@3.11/lib"),
    ],
)
def test_what_is_shown_of_a_variable(name: str, value: str, shown: str) -> None:
    assert environment.variables({name: value}) == {name: shown}


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("data.root=http://me:s3@cret@host/x", "data.root=http://***@host/x"),
        ("data.root=http://me:s3/cret@host/x", "data.root=http://***@host/x"),
        ("data.root=https://host/x?sig=s3cret&token=s3cret", "data.root=https://host/x?***"),
        ("api_key:s3cret", "api_key:***"),
        ("+log={api_key: s3cret, mode: online}", "+log={api_key:***"),
        ("log.api_key=s3=cret", "log.api_key=***"),
        ("data.token_budget=4096", "data.token_budget=4096"),
        ("model.selector.keep=0.5", "model.selector.keep=0.5"),
    ],
)
def test_what_is_shown_of_an_argument(word: str, shown: str) -> None:
    assert environment.mask_argument(word) == shown


def test_a_mistake_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever prints it, and whatever keeps it: the terminal, HALTED.json."""
    monkeypatch.setenv("SOME_TOKEN", "hunter2-hunter2")
    with pytest.raises(TrainingHalted) as caught, environment.discreet():
        raise TrainingHalted("no hunter2-hunter2", found="hunter2-hunter2", expected="a", remedy="b hunter2-hunter2")
    assert str(caught.value) == "no ***\n  found:    ***\n  expected: a\n  remedy:   b ***"
    assert caught.value.exit_code == TrainingHalted.exit_code


def test_a_crash_of_another_rank_prints_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    error = ValueError("no access with hf_s3cret")
    rank._log_crash(1, ValueError, error, None)
    printed = capsys.readouterr().err
    assert "no access with ***" in printed
    assert "s3cret" not in printed


def test_messages_hold_no_secret_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    monkeypatch.setenv("OTHER_KEY", "short")
    try:
        raise ValueError("no access with hf_s3cret")
    except ValueError as error:
        told = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.INFO, "x", 1, "Bearer %s, in short", ("hf_s3cret",), told)
    text = environment.Discreet("%(message)s").format(record)
    assert text.startswith("Bearer ***, in short\nTraceback")
    assert "no access with ***" in text
    assert "s3cret" not in text
    with pytest.raises(ValueError, match="hf_s3cret"), BlackBox(RunFolder(tmp_path), 0, Progress()):
        raise told[1]
    box = (tmp_path / "black_box" / "rank_0.json").read_text()
    assert "no access with ***" in box
    assert "hf_s3cret" not in box
