"""Two steps of a run with everything around them: save, kill, resume, export, evaluation; and what that has proved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from anchorformer.errors import UserError
from data.images import load as load_image
from data.mixture import open_sources
from evals.questions import Question, question
from train.config import NO_TRACKER, CheckpointConfig, LogConfig, RunConfig
from train.prepare import prepare
from train.run.folder import RunFolder
from train.run.lock import acquired, release
from train.start import Topology, command, environment

STEPS = 2
"""One before the kill, which comes behind the first checkpoint, and one after it."""
FOLDER = "rehearsals"
QUESTIONS = 4


def rehearse(config: RunConfig, words: Sequence[str]) -> list[str]:
    """Runs the rehearsal below `<output_root>/rehearsals/` and says what it proved, line by line.

    Every value of the config stays, but the length, the output folder, how often is saved and logged, and the tracker.

    Args:
        words: what the user typed.

    Raises:
        UserError: several nodes; or a part of the rehearsal has failed, which the run would have met later.
    """
    if config.hardware.nodes > 1:
        raise UserError(
            "a rehearsal runs on one node", found=f"hardware.nodes={config.hardware.nodes}", expected="one node",
            remedy="add hardware.nodes=1 and rehearse on one of them: only the network between them is left out",
        )  # fmt: skip
    short = shortened(config)
    _clear(Path(short.output_root) / short.run)
    proved = []
    begin = time.perf_counter()

    folder = prepare(short, words)
    folder.rehearsal.touch()
    proved.append(f"data, model and folders of the run are there and fit each other ({_since(begin)})")

    code = _attempt(folder, short)
    sealed = sorted(path.parent.name for path in folder.state.glob("step-*/COMPLETE"))
    if folder.halted.is_file() or not sealed:
        raise _failed("the first steps", folder, f"exit code {code}, checkpoints: {', '.join(sealed) or 'none'}")
    if not folder.done.is_file():
        # Not started again by its own agent: then by the same command, as a user would.
        folder = prepare(short, words)
        code = _attempt(folder, short)
    steps = [json.loads(line) for line in folder.metrics.read_text().splitlines()] if folder.metrics.is_file() else []
    if code != 0 or not folder.done.is_file() or [line["step"] for line in steps] != list(range(1, STEPS + 1)):
        raise _failed("going on after the kill", folder, f"exit code {code}, steps {[line['step'] for line in steps]}")
    losses = ", ".join(f"{line['loss']:.4f}" for line in steps)
    proved.append(
        f"{config.world_size} rank(s) took {STEPS} steps of {config.stage.global_batch} samples, losses {losses}; peak "
        f"memory of a rank {max(line['time']['peak_memory_gib'] for line in steps):.1f} GiB"
    )
    proved.append(f"rank {config.world_size - 1} was killed (-9), and the run went on from {sealed[-1]}, to the bit")
    proved += [_look(folder), _ask(folder, short)]
    release(folder.path)
    return [*proved, f"took {_since(begin)}, lies in {folder.path}; not proved: the longest samples, and long hours"]


def shortened(config: RunConfig) -> RunConfig:
    """The config of the rehearsal of a run."""
    return replace(
        config,
        run=f"{FOLDER}/{config.run}",
        stage=replace(config.stage, epochs=None, max_steps=STEPS),
        log=LogConfig(every=1),
        checkpoint=CheckpointConfig(every=1, keep=STEPS),
        tracker=NO_TRACKER,
        profile=None,
        resume="auto",
    )


def _attempt(folder: RunFolder, config: RunConfig) -> int:
    argv = command(folder.path, config, Topology())
    # The agent gives the lock back as if it had taken it; until then this process has it.
    return subprocess.run(argv, env=environment(config, os.environ), check=False).returncode


def _look(folder: RunFolder) -> str:
    """Reads back everything that was written."""
    from train.run.verify import verify

    findings = list(verify(folder))
    broken = [f"{finding.what}: {finding.problem}" for finding in findings if finding.problem is not None]
    if broken:
        raise _failed("reading back what was written", folder, "; ".join(broken))
    size = sum(path.stat().st_size for path in (folder.state / f"step-{STEPS:08d}").iterdir())
    return f"checkpoints ({size / 1e6:.1f} MB each), record and exported model have the hashes they were written with"


def _ask(folder: RunFolder, config: RunConfig) -> str:
    """Evaluates the exported model on a few samples of the run's own data."""
    from anchorformer.processing import AnchorFormerProcessor
    from anchorformer.weights import load_model
    from evals.respondent import ModelRespondent
    from train.distributed import choose_device
    from train.precision import choose_dtype

    processor = AnchorFormerProcessor.from_pretrained(folder.model)
    device = choose_device(config.hardware.device, 0)
    model = load_model(folder.model, torch.float32)
    dtype = choose_dtype(config.hardware.precision, device, model.config.text_config.hidden_size)
    respondent = ModelRespondent(model.to(device, dtype), processor, QUESTIONS, {})
    asked = list(_questions(config))
    answers = respondent.answers(asked, max_new_tokens=8)
    losses = respondent.answer_losses([one for one in asked if one.references])
    nats = sum(loss for loss, _ in losses) / max(1, sum(count for _, count in losses))
    return f"the exported model loads, and answers {len(answers)} of the run's samples; loss per token {nats:.4f}"


def _questions(config: RunConfig) -> Iterator[Question]:
    """The first few records whose images can be read."""
    source, _ = open_sources(config.data)[0]
    found = 0
    for index in range(len(source)):
        one = question(source[index])
        try:
            for ref in one.images:
                load_image(ref)
        except UserError:
            continue  # what becomes of it is `data.on_bad_image`'s to say, and the steps have asked that
        yield one
        found += 1
        if found == QUESTIONS:
            return


def _clear(path: Path) -> None:
    """Removes an earlier rehearsal of this run."""
    if path.is_dir():
        with acquired(path):
            shutil.rmtree(path)


def _failed(part: str, folder: RunFolder, found: str) -> UserError:
    if folder.halted.is_file():
        found = f"{found}; {json.loads(folder.halted.read_text())['message']}"
    release(folder.path)
    return UserError(
        f"the rehearsal has failed at {part}", found=found, expected="what the run itself will need",
        remedy=f"see {folder.log(0).parent} and {folder.black_boxes}",
    )  # fmt: skip


def _since(begin: float) -> str:
    return f"{time.perf_counter() - begin:.0f} s"
