"""A run folder proves itself: what is tampered with is named, and two of them can be compared."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from anchorformer.errors import UserError
from tests.train.cases import ALIGN
from tests.train.conftest import MakeRun, launch_again, write_run
from tests.train.test_resume import run_until
from train.checkpoint import retention, seal
from train.distributed import alone
from train.engine.files import Files
from train.engine.universal import convert
from train.run import lock
from train.run.folder import RunFolder
from train.run.identity import Identity, check_ranks_agree, check_same_run
from train.run.process import began
from train.run.verify import verify
from train.verbs import checkpoint as verb
from train.verbs import diff


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_data: Path) -> RunFolder:
    """A run that is done, with two checkpoints; tests copy it before they spoil it."""
    root = tmp_path_factory.mktemp("runs")
    start = Path(shutil.copytree(tiny_folder, root / "start"))
    folder = write_run(root, start, tiny_data, "done", ALIGN, stage__max_steps=2, checkpoint__every=1)
    run_until(alone(), str(folder.path))
    return folder


@pytest.fixture
def copied(finished: RunFolder, tmp_path: Path) -> RunFolder:
    """The finished run and its start folder, to be spoiled."""
    folder = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "done")))
    start = shutil.copytree(finished.start, tmp_path / "start")
    lines = (folder.path / "start.txt").read_text().splitlines()
    folder.write_sealed({"start.txt": f"{start}\n{lines[1]}\n"})
    return folder


def broken(folder: RunFolder) -> str:
    """What `verify` finds fault with."""
    try:
        return "; ".join(f"{found.what}: {found.problem}" for found in verify(folder) if found.problem is not None)
    except UserError as error:
        return str(error)


def test_an_untouched_folder_passes(copied: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb.main(["verify", str(copied.path)]) == 0
    told = capsys.readouterr().out
    for part in ("config", "start folder", "state/step-00000001", "state/step-00000002", "model"):
        assert f"ok      {part}" in told
    copied.check_seal()


def changed_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def gone(path: Path) -> None:
    path.unlink()


def planted(path: Path) -> None:
    path.with_name("planted.pt").write_bytes(b"anything")


SEALED = ("config.yaml", "environment.json", "start.txt", "identity.json")
OF_A_CHECKPOINT = (
    "connector.safetensors", "optimizer.safetensors", "engine.json", "trainer.json", "fingerprints.json",
    "MANIFEST.json", "COMPLETE",
)  # fmt: skip
STEP = "state/step-00000002"
TAMPERED = [
    *((change, name, name) for name in SEALED for change in (longer, gone)),
    *((change, f"{STEP}/{name}", name) for name in OF_A_CHECKPOINT for change in (changed_byte, longer, cut, gone)),
    (planted, f"{STEP}/COMPLETE", "planted.pt is not on its list of files"),
    (changed_byte, "metrics.jsonl", "metrics.jsonl has been changed"),
    (changed_byte, "model/connector.safetensors", "connector.safetensors"), (gone, "model/config.json", "config.json"),
    (changed_byte, "../start/language_model.safetensors", "language_model.safetensors"),
    (longer, "../start/MANIFEST.json", "not the one that the run began with"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "name", "told"), TAMPERED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_tampering_is_named(copied: RunFolder, change: Callable[[Path], None], name: str, told: str) -> None:
    change(copied.path / name)
    assert told in broken(copied)


def test_a_resumption_asks_for_the_seal(copied: RunFolder) -> None:
    for name in ("config.yaml", "identity.json"):
        with (copied.path / name).open("a") as file:
            file.write("\n")
    with pytest.raises(UserError, match="not as the run left it") as caught:
        copied.check_seal()
    assert caught.value.found == "config.yaml has been changed; identity.json has been changed"


@pytest.mark.parametrize("is_first", [False, True])
def test_a_kill_between_sealed_files_does_no_harm(
    copied: RunFolder, is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is written last before the kill, the folder passes: with the old file, without one, or with the new."""
    from train.run import folder as module

    write = module.write_atomically
    for survived in range(4):
        calls = iter(range(survived))

        def killed(path: Path, text: str, calls: object = calls) -> None:
            if next(calls, None) is None:  # type: ignore[call-overload]
                raise KeyboardInterrupt
            write(path, text)

        monkeypatch.setattr(module, "write_atomically", killed)
        if is_first:
            copied.identity.unlink(missing_ok=True)
            sealed = json.loads(copied.seal.read_text())
            copied.seal.write_text(json.dumps({name: sealed[name] for name in sealed if name != "identity.json"}))
        texts = {"environment.json": f'{{"before": [], "n": {survived}}}', "identity.json": f'{{"n": {survived}}}'}
        with pytest.raises(KeyboardInterrupt):
            copied.write_sealed(texts)
        copied.check_seal()
    monkeypatch.undo()
    copied.write_sealed(texts)
    copied.check_seal()
    copied.path.joinpath("identity.json").write_text('{"n": 0}')
    with pytest.raises(UserError, match=r"identity\.json has been changed"):
        copied.check_seal()


def test_a_record_that_was_changed_stops_the_resumption(copied: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    launch_again(copied, resume=str(copied.state / "step-00000001"))
    first, second = copied.metrics.read_text().splitlines()
    copied.metrics.write_text(first.replace('"loss": ', '"loss": 1') + "\n" + second + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl has been changed since step-00000001"):
        run_until(alone(), str(copied.path))
    copied.metrics.unlink()
    with caplog.at_level(logging.WARNING):
        run_until(alone(), str(copied.path))
    assert "metrics.jsonl is gone" in caplog.text
    assert [json.loads(line)["step"] for line in copied.metrics.read_text().splitlines()] == [2]


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_not_run(copied: RunFolder, tmp_path: Path) -> None:
    """Not on the list it is not read; on a list that was sealed again it is read as weights only."""
    step, trap = copied.state / "step-00000002", tmp_path / "trap"
    bad = step / "mp_rank_00_model_states.pt"
    bad.write_bytes(pickle.dumps({"module": Malicious(trap)}, protocol=2))
    assert seal.damage(step, alone()) == "mp_rank_00_model_states.pt is not on its list of files"
    with pytest.raises(UserError, match="was not loaded"):
        Files().load(str(bad))
    assert not trap.exists()


def test_a_malicious_pickle_is_not_run_by_the_converter(tmp_path: Path) -> None:
    """Which reads with `weights_only=False`, but for the variable that it is started with."""
    source, trap = tmp_path / "step", tmp_path / "trap"
    source.mkdir()
    torch.save({"optimizer_state_dict": Malicious(trap)}, source / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(UserError, match="cannot be converted") as caught:
        convert(source, tmp_path / "universal")
    assert "Weights only load failed" in caught.value.found
    assert not trap.exists()


IDENTITY = Identity(
    config="c" * 64, start="s" * 64, data={"source a": "1"}, order="o" * 64, trained="t" * 64, code="x" * 64,
    versions={"torch": "2.13.0"},
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [({"order": "p"}, "order of samples"), ({"trained": "p"}, "set of trained parameters"),
     ({"start": "p"}, "start folder"), ({"config": "p"}, "configuration"),
     ({"data": {"source a": "2"}}, "data have changed since then: source a")],
)  # fmt: skip
def test_another_run_is_refused(change: dict[str, object], words: str) -> None:
    now = replace(IDENTITY, **change)
    with pytest.raises(UserError, match=words):
        check_same_run(IDENTITY, now, "then")
    with pytest.raises(UserError, match="rank 1 is not at the same run as rank 0") as caught:
        check_ranks_agree([IDENTITY.to_dict(), now.to_dict()])
    assert next(iter(change)) in caught.value.found


def test_other_code_is_told_on_resumption_and_refused_between_ranks(caplog: pytest.LogCaptureFixture) -> None:
    now = replace(IDENTITY, code="y" * 64, versions={"torch": "2.14.0"})
    with caplog.at_level(logging.WARNING):
        check_same_run(IDENTITY, now, "then")
    assert "the code has changed" in caplog.text
    assert "torch is another version than at then: 2.13.0, now 2.14.0" in caplog.text
    with pytest.raises(UserError, match="rank 1"):
        check_ranks_agree([IDENTITY.to_dict(), now.to_dict()])
    with pytest.raises(UserError, match="rank 1"):
        check_ranks_agree([{"configuration": "d"}, {"configuration": "e"}])


def test_what_lies_below_state_is_listed_and_pruned(copied: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (copied.state / f"step-0000000{step}" for step in (1, 2))
    for name in (".tmp-step-00000003", ".abandoned-step-00000009", "step-00000004"):
        shutil.copytree(two, copied.state / name)
    (copied.state / "step-00000004" / "COMPLETE").unlink()
    assert verb.main(["list", str(copied.path)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "step 2, for any number of rank(s)" in lines["step-00000002"]
    assert "incomplete: it was never completed" in lines["step-00000004"]
    changed_byte(two / "connector.safetensors")
    assert verb.main(["prune", str(copied.path), "keep=1"]) == 0
    assert {path.name for path in copied.state.iterdir()} == {"latest", one.name}, "the newest that has its hashes"
    changed_byte(one / "connector.safetensors")
    assert verb.main(["prune", str(copied.path), "keep=1"]) == 0
    assert one.is_dir(), "nothing is deleted where nothing complete is left"
    (copied.state / ".tmp-step-00000003").mkdir()
    assert verb.main(["prune", str(copied.path), "keep=1"]) == 0
    assert {path.name for path in copied.state.iterdir()} == {"latest", one.name}, "but what was never complete"


def test_the_verbs_explain_themselves(copied: RunFolder) -> None:
    for words, expected in (
        (["verfy", "x"], "verify"),
        (["list"], "RUN"),
        (["prune", str(copied.path), "keep=0"], "keep=1"),
    ):
        with pytest.raises(UserError) as caught:
            verb.main(words)
        assert expected in str(caught.value)
    for words in (["verify", str(copied.path / "state")], ["list", str(copied.path), "more"]):
        with pytest.raises(UserError):
            verb.main(words)
    lock.acquire(copied.path)
    taken = replace(lock.Holder.myself(), pid=os.getppid(), ticks=began(os.getppid()))
    (copied.path / lock.FILE).write_text(json.dumps(asdict(taken)))
    with pytest.raises(UserError, match="another launch holds"):
        verb.main(["prune", str(copied.path)])


def test_abandoned_checkpoints_go_behind_the_new_course(copied: RunFolder) -> None:
    two = copied.state / "step-00000002"
    for step in (1, 2, 3):
        shutil.copytree(two, copied.state / f".abandoned-step-0000000{step}")
    shutil.copytree(two, copied.state / ".abandoned-step-00000002-2")
    shutil.copytree(two, copied.state / ".universal-step-00000001")
    retention.prune(copied.state, 2, two)
    assert {path.name for path in copied.state.iterdir()} == {
        "latest", "step-00000001", "step-00000002", ".abandoned-step-00000003",
    }  # fmt: skip


def test_diff_of_two_runs(finished: RunFolder, make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"stage__max_steps": 2, "checkpoint__every": 1}
    same, other = make_run("same", ALIGN, **changes), make_run("other", ALIGN, **changes, seed=5)
    for folder in (same, other):
        run_until(alone(), str(folder.path))
    assert diff.main([str(same.path), str(finished.path)]) == 0
    assert "have the same numbers" in capsys.readouterr().out
    assert diff.main([str(same.path), str(other.path)]) == 1
    told = capsys.readouterr().out
    assert "seed: 0 | 5" in told
    assert "order of samples" in told
    assert "metrics, step 1 (the first of 2 that differ):" in told
    assert "(the widest gap)" in told
    with pytest.raises(UserError, match="two words"):
        diff.main([str(same.path)])
