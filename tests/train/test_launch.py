"""From a composed config to running ranks: run folders, torchrun's command and environment, exit codes, launch/."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

import train.__main__ as entry
from anchorformer.errors import UserError, run_guarded
from tests.train.tiny_world import write_world
from train import network
from train import prepare as preparing
from train import start as starting
from train.compose import ROOT, compose
from train.config import RunConfig
from train.run.folder import RunFolder

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.fixture
def world(tmp_path: Path, tiny_backbones: Path) -> list[str]:
    """Overrides of a run on three captions and the tiny backbones, everything below one folder."""
    return write_world(tmp_path, tiny_backbones)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, list[str], dict[str, str]]]:
    """Runs that would have replaced this process by the agent: folder, command, environment."""
    calls: list[tuple[Path, list[str], dict[str, str]]] = []

    def execute(path: str, argv: list[str], env: dict[str, str]) -> None:
        calls.append((Path(argv[-1]), argv, env))

    monkeypatch.setattr(os, "execve", execute)
    return calls


def launch(overrides: Sequence[str]) -> None:
    entry.main(list(overrides))


def test_a_run_folder_is_made_once_and_holds_what_ranks_need(world: list[str], started: list) -> None:
    launch([*world, "run=first/align"])
    [(path, argv, _)] = started
    folder = RunFolder(path)
    held = {"LOCK", "SEAL.json", "config.yaml", "environment.json", "start.txt"}
    assert {item.name for item in path.iterdir()} == held
    config = folder.read_config()
    assert config.run == "first/align"
    assert config.model.connector["ff_mult"] == 4
    assert (folder.start / "connector.safetensors").is_file()
    facts = json.loads((path / "environment.json").read_text())
    assert {"torch", "transformers", "deepspeed"} <= set(facts["versions"])
    assert argv[argv.index("-m") + 1] == "train.faults.agent"

    with pytest.raises(UserError, match="exists already"):
        launch([*world, "run=first/align"])
    # A second run of the same model starts from the same folder; another seed gets its own fresh connector.
    launch([*world, "run=second"])
    launch([*world, "run=third", "seed=1"])
    second, third = (RunFolder(call[0]).start for call in started[1:])
    assert second == folder.start
    assert third != folder.start
    read = [(start / "connector.safetensors").read_bytes() for start in (second, third)]
    assert read[0] != read[1]


def test_two_launches_at_once_get_two_folders(world: list[str], started: list) -> None:
    launch(world)  # leaves the start folder and the caches behind, so that the next two meet at the run folder
    unnamed, named = [compose(world), compose(world)], [compose([*world, "run=same"])] * 2
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(_outcome, unnamed)) == ["made", "made"]
        assert sorted(threads.map(_outcome, named)) == ["exists", "made"]
    runs = list((started[0][0].parent).glob("align-*"))
    assert len(runs) == 3
    assert all((run / "config.yaml").is_file() for run in runs)


def _outcome(config: RunConfig) -> str:
    try:
        preparing.prepare(config, [])
    except UserError:
        return "exists"
    return "made"


def test_resuming_needs_the_same_numbers(world: list[str], started: list) -> None:
    launch([*world, "run=one"])
    folder = RunFolder(started[0][0])
    folder.write_halted(3, "a loss was not finite")
    launch([*world, "run=one", "resume=auto", "log.every=1", "hardware.ranks=1", "zero=zero3"])
    assert folder.read_config().resume == "auto"
    assert folder.read_config().log.every == 1
    assert folder.read_config().world_size == 1, "how a step is cut may change"
    attempts = json.loads((folder.path / "environment.json").read_text())
    assert len(attempts["before"]) == 1, "what an attempt ran with is kept"
    assert not folder.halted.exists()
    with pytest.raises(UserError, match="another config") as caught:
        launch([*world, "run=one", "resume=auto", "seed=4", "stage.trains.connector.lr=1e-5"])
    assert "seed (was 0, now 4)" in caught.value.found
    assert "stage.trains.connector.lr (was 0.001, now 1e-05)" in caught.value.found
    assert folder.read_config().seed == 0
    folder.done.touch()
    launch([*world, "run=one", "resume=auto"])
    assert len(started) == 2, "a run that is done is not started again"


def test_a_stopped_launch_leaves_no_half_run(
    world: list[str], started: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "make_start_folder", broken)
    with pytest.raises(KeyboardInterrupt):
        launch([*world, "run=one"])
    assert not (tmp_path / "checkpoints" / "one").exists()
    monkeypatch.undo()


def test_finetune_starts_from_a_finished_run(world: list[str], started: list, tmp_path: Path) -> None:
    launch([*world, "run=a/align"])
    align = RunFolder(started[0][0])
    finetune = [*world[1:], "stage=finetune", f"init_from={align.path}", "run=a/finetune"]
    with pytest.raises(UserError, match="not done"):
        launch(finetune)
    shutil.copytree(align.start, align.model)
    align.done.touch()
    launch(finetune)
    assert RunFolder(started[1][0]).start == align.model
    with pytest.raises(UserError, match="init_from names no model"):
        launch([*world, "run=b", f"init_from={tmp_path}/data"])
    for wrong in ("a/align", f"{tmp_path}/checkpoints/a/aling"):
        with pytest.raises(UserError, match="init_from names no model") as caught:
            launch([*world, "run=b", f"init_from={wrong}"])
        assert f"'{align.path}'" in caught.value.expected
        assert caught.value.remedy == f"e.g. init_from={align.path}"
    for folder in ("a", f"{tmp_path}/checkpoints/a"):
        with pytest.raises(UserError, match="init_from names no model") as caught:
            launch([*world, "run=b", f"init_from={folder}"])
        assert caught.value.expected == f"'{align.path}' or '{align.path.parent}/finetune'?"


def test_several_nodes_compose_once_and_compare(
    world: list[str], started: list, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [*world, "hardware.nodes=2", "run=wide"]
    with pytest.raises(UserError, match="several nodes"):
        launch(nodes)
    launch(["prepare", *nodes])
    state, folder, digest = capsys.readouterr().out.splitlines()[-1].split()
    assert state == "prepared"
    with pytest.raises(UserError, match="no HEAD_ADDR"):
        launch(["start", folder, digest])
    waited: list[tuple[str, int]] = []
    monkeypatch.setattr(network, "own_addresses", lambda: {"10.0.0.2": "ib0"})
    monkeypatch.setattr(starting, "wait_for_head", lambda *head: waited.append(head))
    for name, value in {"HEAD_ADDR": "node0", "NODE_RANK": "1", "NODE_ADDR": "10.0.0.2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="another config"):
        launch(["start", folder, digest[::-1]])
    before = {path: path.stat().st_mtime_ns for path in Path(folder).iterdir()}
    launch(["start", folder, digest, "--dry-run"])
    assert {path: path.stat().st_mtime_ns for path in Path(folder).iterdir()} == before
    assert not started
    printed = capsys.readouterr().out
    launch(["start", folder, digest])
    [(_, argv, env)] = started
    assert waited == [("node0", 29400)]
    assert {"--nnodes=2", "--rdzv-endpoint=node0:29400", "--rdzv-conf=is_host=0", "--local-addr=10.0.0.2"} <= set(argv)
    assert f"--rdzv-id={digest[:16]}.1" in argv, "the same on all nodes, another for the next launch"
    assert f"# {shlex.join(argv)}\n" in printed
    assert "# stage align: 4 rank(s) in 2 nodes, fp32, ZeRO-2" in printed
    assert (env["GLOO_SOCKET_IFNAME"], env["NCCL_SOCKET_IFNAME"]) == ("ib0", "=ib0")


def test_a_run_for_one_node_is_not_started_on_two(
    world: list[str], started: list, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HEAD_ADDR", raising=False)
    monkeypatch.setenv("SLURM_NNODES", "2")
    with pytest.raises(UserError, match=r"hardware\.nodes=1") as caught:
        launch(["prepare", *world, "run=narrow"])
    assert "hardware.nodes=2" in caught.value.remedy
    assert not (tmp_path / "checkpoints" / "narrow").exists()
    monkeypatch.delenv("SLURM_NNODES")
    launch(["prepare", *world, "run=narrow"])
    told, last = capsys.readouterr().out.splitlines()[-2:]
    words = last.split()[1:]
    assert told.endswith(f"python -m train start {' '.join(words)}"), "one node needs no address of a head"
    for name in ("NODE_RANK", "SLURM_NNODES"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1" if name == "NODE_RANK" else "2")
            with pytest.raises(UserError, match=r"hardware\.nodes=1"):
                launch(["start", *words])
    monkeypatch.setenv("NODE_RANK", "first")
    with pytest.raises(UserError, match="NODE_RANK is not a whole number"):
        launch(["start", *words])
    monkeypatch.setenv("NODE_RANK", "0")
    monkeypatch.setenv("SLURM_NNODES", "1")
    launch(["start", *words])
    assert len(started) == 1


@pytest.mark.parametrize(
    ("device", "count", "remedy"),
    [("cuda", 0, "hardware=cpu"), ("cuda", 1, "hardware.ranks=1, or"), ("auto", 1, "hardware.ranks=1, or"),
     ("cuda", 2, None), ("auto", 0, None), ("cpu", 0, None)],
)  # fmt: skip
def test_devices_are_counted_before_anything_is_written(
    world: list[str], started: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, count: int,
    remedy: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(starting, "_num_cuda_devices", lambda: count)
    run = [*world, f"hardware.device={device}", "run=counted"]
    if remedy is None:
        starting.check_devices(compose(run))
        return
    with pytest.raises(UserError, match=f"hardware.device={device}, but {count} CUDA") as caught:
        launch(run)
    assert caught.value.remedy.startswith(remedy)
    assert not (tmp_path / "checkpoints").exists()
    assert not started


def test_environment_of_the_ranks(tmp_path: Path) -> None:
    config = compose(["stage=align", "hardware=cpu", "data.root=/data", "hardware.threads=3"])
    outer = {"RANK": "1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "HOME": "/home/me", "WANDB_MODE": "online"}
    env = starting.environment(config, outer)
    assert not {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(env)
    assert env["HOME"] == "/home/me"
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["DS_ACCELERATOR"] == "cpu"
    assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert env["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
    assert env["WANDB_MODE"] == "online", "what the user says stays"
    assert str(ROOT) in env["PYTHONPATH"].split(os.pathsep)
    assert "DS_ACCELERATOR" not in starting.environment(compose(["stage=align", "data.root=/data"]), outer)


WORKER = """
import os, signal, sys, time
from pathlib import Path
from train.run.folder import RunFolder
rank, mode, folder = int(os.environ["RANK"]), sys.argv[1], RunFolder(Path(sys.argv[2]))
if mode == "mistake" and rank == 1:
    sys.exit(2)
if mode == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "halted":
    folder.write_halted(3, "no gradient")
    sys.exit(1 if rank else 3)
(folder.path / f"started_{rank}").touch()
if mode != "well":
    time.sleep(60)
"""


def agent(tmp_path: Path, mode: str) -> subprocess.Popen[str]:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    argv = [
        sys.executable,
        "-m",
        "train.faults.agent",
        "--standalone",
        "--nproc-per-node=2",
        str(worker),
        mode,
        str(tmp_path),
    ]
    config = compose(["stage=align", "hardware=cpu", "data.root=/data"])
    env = starting.environment(config, os.environ)
    return subprocess.Popen(argv, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("mode", "code"),
    [
        ("mistake", 2),
        pytest.param("halted", 3, marks=pytest.mark.slow),
        pytest.param("killed", 137, marks=pytest.mark.slow),
        pytest.param("well", 0, marks=pytest.mark.slow),
    ],
)
def test_the_agent_ends_as_its_ranks_do(tmp_path: Path, mode: str, code: int) -> None:
    process = agent(tmp_path, mode)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    if mode == "halted":
        assert not errors.strip(), "the ranks have said why they stopped"


@pytest.mark.slow
def test_a_signal_to_the_agent_reaches_its_ranks(tmp_path: Path) -> None:
    process = agent(tmp_path, "sleeping")
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("started_*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors


def run_script(*arguments: str, unset: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "HEAD_ADDR": "node0", "NODE_RANK": "1"}
    env.pop(unset, None)
    return subprocess.run(list(arguments), capture_output=True, text=True, env=env, cwd="/")


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "launch" / "slurm.sbatch"], ids=lambda path: path.name)
def test_scripts_say_what_they_are_for(script: Path) -> None:
    if script.name == "common.sh":
        return
    for flag in ("--help", "-h"):
        done = run_script(str(script), flag)
        assert done.returncode == 0, done.stderr
        assert f"launch/{script.name} " in done.stdout
        assert "shellcheck" not in done.stdout
        assert "#" not in done.stdout


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [("cpu.sh", "", ["--nproc-per-node=2", "# stage align: 2 rank(s), fp32, ZeRO-2"]),
     ("one_gpu.sh", "", ["--nproc-per-node=1", "# stage align: 1 rank(s), bf16, ZeRO-2"]),
     ("slurm.sbatch", "hardware=a100x8_2nodes", ["--nnodes=2", "# stage align: 16 rank(s) in 2 nodes of a100-80gb"])],
)  # fmt: skip
def test_a_dry_run_prints_the_config_the_command_and_the_plan(script: str, words: str, expected: list[str]) -> None:
    before = set((ROOT / "checkpoints").iterdir())
    given = ["--dry-run", "stage=align", "data.root=/data", "run=dry", *words.split()]
    done = run_script(str(ROOT / "launch" / script), *given)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in [*expected, "global_batch: 256", "# peak "])
    composed = yaml.safe_load("\n".join(line for line in done.stdout.splitlines() if not line.startswith("+")))
    assert composed["run"] == "dry"
    assert set((ROOT / "checkpoints").iterdir()) == before


NVIDIA_SMI = """#!/usr/bin/env bash
for word in "$@"; do
    [[ $word != --id=* ]] || { IFS=, read -ra ids <<<"${word#--id=}"; }
done
mapfile -t cards <<<"$CARDS_HERE"
for id in "${ids[@]:-${!cards[@]}}"; do echo "${cards[$id]}"; done
"""


@pytest.mark.parametrize(
    ("cards", "visible", "expected"),
    [(["NVIDIA A100-SXM4-80GB, 81920"] * 8, "", "hardware=a100x8 hardware.ranks=8"),
     (["NVIDIA A100-SXM4-40GB, 40960"] * 4, "", "hardware=a100_40gbx8 hardware.ranks=4"),
     (["NVIDIA A100 80GB PCIe, 81920", "NVIDIA A100-PCIE-40GB, 40960"], "", "hardware=a100_40gbx8 hardware.ranks=2"),
     (["NVIDIA A100-PCIE-40GB, 40960", "NVIDIA A100 80GB PCIe, 81920"], "1", "hardware=a100x8 hardware.ranks=1"),
     (["NVIDIA H100 80GB HBM3, 81559"], "", None)],
    ids=["8 of 80 GB", "4 of 40 GB", "both, the smaller counts", "the visible one", "another card"],
)  # fmt: skip
def test_a_node_of_a100s_is_told_by_its_cards(
    tmp_path: Path, cards: list[str], visible: str, expected: str | None
) -> None:
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    for name in ("nvidia-smi", "python"):
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [ROOT / "launch" / "a100.sh", "stage=align"], capture_output=True, text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"),
             "CARDS_HERE": "\n".join(cards), "CUDA_VISIBLE_DEVICES": visible},
    )  # fmt: skip
    if expected is None:
        assert (done.returncode, done.stdout) == (2, "")
        assert "error: these cards are no A100s\n  found:    NVIDIA H100 80GB HBM3, 81559\n" in done.stderr
    else:
        assert done.stdout.splitlines()[-1] == f"-m train run {expected} stage=align", done.stderr


def test_a_dry_run_for_a100s_elsewhere_is_told_of_them(tmp_path: Path) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    script = str(ROOT / "launch" / "a100.sh")
    told = run_script("env", f"PYTHON={tmp_path}/python", "CARDS=4", "MEMORY_GB=40", script, "--dry-run", "stage=align")
    assert told.stdout.splitlines()[-1] == "-m train run --dry-run hardware=a100_40gbx8 hardware.ranks=4 stage=align"
    if shutil.which("nvidia-smi") is None:
        done = run_script(script, "--dry-run", "stage=align")
        assert (done.returncode, done.stdout) == (2, "")
        assert "CARDS=8 MEMORY_GB=80 launch/a100.sh --dry-run" in done.stderr


@pytest.mark.slow
def test_a_dry_run_of_a_sweep_prints_its_first_runs_and_all_points(tmp_path: Path) -> None:
    words = [
        "sweep=miniworld_smoke",
        "model.selector.num_anchors=5",
        "model.connector.depth=1,2",
        f"output_root={tmp_path}",
        "data.root=/no/world",
    ]
    done = run_script(str(ROOT / "launch" / "sweep.sh"), "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    first, line = done.stdout.splitlines()[:2]
    assert first.startswith("+ ")
    assert line.startswith(f"run: {words[0].removeprefix('sweep=')}")
    assert done.stdout.count("-m train.rank") == 2, "its align and its finetune"
    assert done.stdout.count("# no plan: the shape of") == 2, "its backbones are not there yet"
    assert "2 points, 2 trials, 2 stages 1; 4 of these would run" in done.stdout
    assert not list(tmp_path.iterdir())


def test_two_stages_are_wired() -> None:
    words = ["--dry-run", "demo", "experiment=smoke", "finetune:stage.max_steps=9", "output_root=/out"]
    done = run_script(str(ROOT / "launch" / "two_stage.sh"), *words)
    assert done.returncode == 0, done.stderr
    align, finetune = done.stdout.split("stage=finetune")
    assert "max_steps: 9" in finetune
    assert "max_steps: 9" not in align
    assert "init_from: /out/demo/align" in finetune
    assert "run: demo/align" in align
    assert run_script(str(ROOT / "launch" / "two_stage.sh")).returncode == 2


def test_a_node_of_several_starts_by_folder_and_hash(tmp_path: Path) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" in $HEAD_ADDR $NODE_RANK $NCCL_DEBUG $NCCL_IB_TIMEOUT\n')
    (tmp_path / "python").chmod(0o755)
    script = str(ROOT / "launch" / "multinode.sh")
    for flags in ([], ["--dry-run"]):
        done = run_script(
            "env", f"PYTHON={tmp_path}/python", "NCCL_IB_TIMEOUT=23", script, *flags, "checkpoints/w", "abc"
        )
        words = " ".join(["-m train start checkpoints/w abc", *flags])
        assert done.stdout.splitlines()[-1] == f"{words} in node0 1 WARN 23", "what the user says stays"
    assert run_script(script, "checkpoints/w").returncode == 2
    for missing in ("HEAD_ADDR", "NODE_RANK"):
        done = run_script(script, "checkpoints/w", "abc", unset=missing)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {missing} is not set")


def test_entry_points_report_mistakes_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    def mistaken() -> None:
        raise UserError("a key is wrong", found="a", expected="b", remedy="write b")

    with pytest.raises(SystemExit) as caught:
        run_guarded(mistaken)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: a key is wrong\n  found:    a\n  expected: b\n  remedy:   write b\n"
    with pytest.raises(ZeroDivisionError):
        run_guarded(lambda: 1 // 0)


def test_verbs_are_the_files_of_their_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"run", "prepare", "start"} <= set(entry.verbs())
    for verb in entry.verbs():
        assert verb in entry.usage()
    for words in (["--help"], ["run", "--help"], ["stage=align", "-h"]):
        assert entry.main(words) == 0
        assert capsys.readouterr().out == entry.usage() + "\n"
    with pytest.raises(UserError, match="unknown verb 'prepar'") as caught:
        launch(["prepar", "stage=align"])
    assert "'prepare'?" in caught.value.expected
    assert isinstance(compose(["stage=align", "data.root=/data"]), RunConfig)


@pytest.mark.slow
def test_two_stages_run_and_are_not_run_again(world: list[str], tmp_path: Path) -> None:
    short = ["stage.epochs=null", "stage.max_steps=2", "stage.global_batch=4", "hardware.micro_batch=1", "seed=5"]
    words = [str(ROOT / "launch" / "two_stage.sh"), "demo", *[text for text in world if text != "stage=align"], *short]
    done = run_script(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    align, finetune = (RunFolder(tmp_path / "checkpoints" / "demo" / stage) for stage in ("align", "finetune"))
    assert align.done.exists()
    assert finetune.done.exists()
    assert finetune.start == align.model
    assert len(finetune.metrics.read_text().splitlines()) == 2
    written = finetune.metrics.stat().st_mtime_ns
    again = run_script(*words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("is done already") == 2
    assert finetune.metrics.stat().st_mtime_ns == written
