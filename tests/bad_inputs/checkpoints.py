"""Run folders, checkpoints and command words that are not what a run has left or needs."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.bad_inputs.case import Case, World
from tests.train.cases import ALIGN, run_config
from train.checkpoint import check_metrics, find, read_state, seal
from train.distributed import alone
from train.prepare import check_files, run_folder
from train.run import lock
from train.run.folder import RunFolder
from train.start import Topology
from train.verbs import checkpoint, diff, start

STEP = "state/step-00000001"

Change = Callable[[Path], object]


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _manifest(path: Path, text: str) -> None:
    """Another list of files, sealed as if it were the right one."""
    path.write_text(text)
    (path.parent / seal.COMPLETE).write_bytes(seal._complete(path.parent))


def _malicious(path: Path) -> None:
    """Whoever unpickles this file leaves a trap behind it."""

    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(path.parent.parent / "trap"),)

    path.write_bytes(pickle.dumps(Malicious()))


def _checkpoint(name: str, file: str, change: Change, *says: str) -> Case:
    """A checkpoint of which one file is changed; a run is to resume from it."""

    def plant(world: World) -> None:
        run = RunFolder(world.copy(world.run))
        change(run.path / STEP / file)
        try:
            position = find(run.state, str(run.path / STEP), alone())
            assert position is not None
            read_state(position, alone(), run.read_config())
            check_metrics(position, run)
        finally:
            assert not (run.state / "trap").exists(), "a planted pickle has been run"

    return Case(f"checkpoint_{name}", plant, says)


CHECKPOINTS = [
    _checkpoint("untouched", "COMPLETE", lambda _: None),
    _checkpoint("never_completed", "COMPLETE", Path.unlink, "no COMPLETE"),
    _checkpoint("without_its_list", "MANIFEST.json", Path.unlink, "no MANIFEST.json"),
    _checkpoint("with_another_list", "MANIFEST.json", _flip, "not the one that COMPLETE seals"),
    _checkpoint("with_another_seal", "COMPLETE", _flip, "not the one that COMPLETE seals"),
    _checkpoint("with_a_list_of_text", "MANIFEST.json", lambda path: _manifest(path, "x"), "not a list of files"),
    _checkpoint("with_a_list_of_nothing", "MANIFEST.json", lambda path: _manifest(path, "[]"), "not a list of files"),
    _checkpoint("of_another_format", "MANIFEST.json", lambda path: _manifest(path, '{"format": 99, "files": {}}'),
                "format 99"),
    *(
        _checkpoint(f"{done}_{file.partition('.')[0]}", file, change, file, says)
        for file in ("connector.safetensors", "optimizer.safetensors", "trainer.json", "engine.json",
                     "fingerprints.json")
        for done, change, says in (("without", Path.unlink, "missing"), ("flipped", _flip, "damaged"),
                                   ("cut", _cut, "bytes instead of"))
    ),
    _checkpoint("with_a_pickle_more", "mp_rank_00_model_states.pt", _malicious, "not on its list"),
    _checkpoint("with_a_pickle_for_weights", "connector.safetensors", _malicious, "connector.safetensors"),
    _checkpoint("with_a_link_more", "link.safetensors", lambda path: path.symlink_to("/etc/passwd"), "not on its list"),
    _checkpoint("with_another_record", "../../metrics.jsonl", _flip, "metrics.jsonl has been changed"),
    _checkpoint("without_the_record", "../../metrics.jsonl", Path.unlink),
]  # fmt: skip


def _run(name: str, meet: Callable[[RunFolder], object], *says: str) -> Case:
    return Case(f"run_{name}", lambda world: meet(RunFolder(world.copy(world.run))), says)


def _with(file: str, text: str | None, then: Callable[[RunFolder], object]) -> Callable[[RunFolder], object]:
    """Puts another text into a file of the run (None: removes it), and lets the program look."""

    def meet(run: RunFolder) -> object:
        if text is None:
            (run.path / file).unlink()
        else:
            (run.path / file).write_text(text)
        return then(run)

    return meet


def _all_damaged(run: RunFolder) -> object:
    (run.path / STEP / "COMPLETE").unlink()
    return find(run.state, "auto", alone())


def _other_config(run: RunFolder) -> object:
    return read_state(run.path / STEP, alone(), run_config(ALIGN, seed=77))


RUNS = [
    _run("untouched", RunFolder.check_seal),
    _run("without_a_config", _with("config.yaml", None, RunFolder.read_config), "no config.yaml"),
    _run("with_a_config_that_is_no_yaml", _with("config.yaml", "a: [1", RunFolder.read_config), "config.yaml"),
    _run("with_a_config_of_nothing", _with("config.yaml", "", RunFolder.read_config), "config.yaml"),
    _run("with_a_config_in_a_list", _with("config.yaml", "- 1\n", RunFolder.read_config), "config.yaml"),
    _run("with_a_key_more", _with("config.yaml", "stge: 1\n", RunFolder.read_config), "unknown key 'stge'"),
    _run("with_a_changed_config", _with("config.yaml", "x", RunFolder.check_seal), "config.yaml has been changed"),
    _run("with_a_changed_environment", _with("environment.json", "x", RunFolder.check_seal), "environment.json"),
    _run("without_identity", _with("identity.json", None, RunFolder.check_seal), "identity.json is missing"),
    _run("without_a_seal", _with("SEAL.json", None, RunFolder.check_seal), "SEAL.json is missing"),
    _run("with_a_seal_of_text", _with("SEAL.json", "x", RunFolder.check_seal), "SEAL.json"),
    _run("without_a_start", _with("start.txt", None, lambda run: run.start), "nothing to start from"),
    _run("with_a_start_of_nothing", _with("start.txt", "", lambda run: run.start), "start.txt"),
    _run("with_no_checkpoint_that_is_whole", _all_damaged, "never completed"),
    _run("of_another_config", _other_config, "another configuration"),
    _run("that_is_no_folder", lambda run: diff.main([str(run.path), str(run.path / "x")]), "no config.yaml"),
    _run("that_is_held", _with("LOCK", "", lambda run: lock.acquire(run.path)), "unreadable"),
]


def _words(name: str, verb: Callable[[list[str]], object], words: list[str], *says: str) -> Case:
    return Case(f"words_{name}", lambda _: verb(words), says)


def _named(name: str, *says: str, **values: str) -> Case:
    """A run that is to be prepared under a name, a start or a resumption that cannot be."""

    def plant(world: World) -> None:
        shutil.copytree(world.run, world.folder / "taken")
        config = run_config(ALIGN, output_root=str(world.folder), data__root=str(world.folder), **values)
        run_folder(config)
        check_files(config)

    return Case(f"prepare_{name}", plant, says)


COMMANDS = [
    _words("of_no_action", checkpoint.main, [], "verify|list|prune|convert"),
    _words("of_an_unknown_action", checkpoint.main, ["verfy", "x"], "'verify'?"),
    _words("of_too_much", checkpoint.main, ["verify", "x", "y"], "too much"),
    Case(
        "words_that_keep_none", lambda world: checkpoint.main(["prune", str(world.run), "keep=0"]), ("keep=1 or more",)
    ),
    _words("of_one_run", diff.main, ["a"], "RUN_A RUN_B"),
    _words("of_a_start_without_a_hash", start.main, ["run"], "CONFIG_HASH"),
    Case("words_of_another_hash", lambda world: start.main([str(world.run), "0" * 64]), ("another config",)),
    Case("node_of_text", lambda _: Topology.from_environment({"NODE_RANK": "first"}), ("NODE_RANK=first",)),
    _named("that_leads_out", "run=../mine", run="../mine"),
    _named("that_is_absolute", "run=/mine", run="/mine"),
    _named("that_is_no_name", "run=.", run="."),
    _named("that_is_taken", "exists already", run="taken"),
    _named("from_no_model", "init_from", run="new", init_from="nowhere"),
    _named("from_no_checkpoint", "resume=nowhere", run="new", resume="nowhere"),
]

CASES = [*CHECKPOINTS, *RUNS, *COMMANDS]
