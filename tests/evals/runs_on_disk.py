"""Folders as runs and sweeps leave them, small enough to write in a test."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

Scores = Mapping[str, Mapping[str, float]]


def write_stage(
    folder: Path,
    losses: Sequence[float],
    evals: Scores | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    state: str = "DONE",
    tokens: int = 17,
    commit: str = "abc",
) -> Path:
    """A run that took a step for each loss and was killed while it wrote another line, unless it has ended.

    Args:
        evals: task -> condition -> score; a task called `caption` is scored by its loss.
        state: name of the file that says how the run stands; "" for none.
        tokens: visual tokens per image.
    """
    (folder / "evals").mkdir(parents=True)
    rows = [
        {
            "step": step, "loss": loss, "lr": {"connector/decay": 1e-3}, "grad_norm": 1.0 + 1 / step, "tokens": 200,
            "samples": 4, "sample_ids": ["a", "b", "c", "d"],
            "time": {"seconds": 0.5, "tokens_per_second": 400.0, "peak_memory_gib": 1.0 + tokens / 100},
        }
        for step, loss in enumerate(losses, start=1)
    ]  # fmt: skip
    cut = "" if state == "DONE" else '{"step": 99, "lo'
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + cut)
    (folder / "environment.json").write_text(
        json.dumps({"host": "here", "python": "3.11", "commit": commit, "versions": {"torch": "2"}})
    )
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    if state:
        (folder / state).write_text("")
    for task, scores in (evals or {}).items():
        for condition, score in scores.items():
            write_result(folder / "evals", task, condition, score, tokens)
    return folder


def write_result(folder: Path, task: str, condition: str, score: float, tokens: int = 17) -> None:
    """One result and its predictions."""
    predictions = folder / f"{task}-{condition}.jsonl"
    predictions.write_text("".join(
        json.dumps({"id": f"q{n}", "prediction": f"<b>{condition}</b>", "references": ["x & y"], "score": float(n % 2)})
        + "\n" for n in range(3)
    ))  # fmt: skip
    predictions.with_suffix(".json").write_text(json.dumps({
        "task": task, "condition": condition, "metric": "loss_per_token" if task == "caption" else "exact_match",
        "n": 100, "n_scored": 100, "score": score, "time": {"seconds": 1.5}, "machine": "2 cores of a test",
        "visual_tokens_per_image": tokens, "predictions": predictions.name,
    }))  # fmt: skip


def config(seed: int = 0, selector: str = "anchor", num_anchors: int = 17, depth: int = 2) -> dict[str, Any]:
    """What tells the runs of a sweep apart, and what does not."""
    return {
        "run": f"somewhere/{seed}-{selector}-{num_anchors}-{depth}", "seed": seed, "output_root": "checkpoints",
        "model": {
            "selector": {"_target_": f"anchorformer.selectors.{selector}.XSelectorConfig", "num_anchors": num_anchors},
            "connector": {"depth": depth},
        },
    }  # fmt: skip


def write_media(run: Path, step: int = 20, names: Sequence[str] = ("one", "two")) -> None:
    """Overlays and answers of a step."""
    media = run / "media" / f"step-{step:08d}"
    media.mkdir(parents=True)
    for position in range(len(names)):
        Image.new("RGB", (64, 48), (40 * position, 90, 160)).save(media / f"{position}-0.png")
    (media / "answers.json").write_text(json.dumps([
        {"id": name, "question": f"what is <i>{name}</i>?", "answer": "</script>", "references": [name, "or so"],
         "overlays": [f"{position}-0.png"]}
        for position, name in enumerate(names)
    ]))  # fmt: skip


def write_sweep(folder: Path, seeds: Sequence[int] = (0, 1), *, with_media: bool = True) -> Path:
    """A sweep of selector x anchors x seed whose align is shared; the last trial has failed, one is running."""
    align = write_stage(folder / "shared" / "0f" / "align", [4.0] * 10 + [0.8] * 10, ALIGNED, config=config())
    points = [
        {"model.selector": selector, "model.selector.num_anchors": anchors, "seed": seed}
        for selector in ("anchor", "random") for anchors in (5, 9, 17) for seed in seeds
    ]  # fmt: skip
    listed = []
    for position, point in enumerate(points):
        selector, anchors, seed = point.values()
        trial = folder / "trials" / f"t{position:02d}"
        trial.mkdir(parents=True)
        listed.append({"grid": "selectors", "point": point, "trial": trial.name})
        is_last, runs_still = position == len(points) - 1, position == len(points) - 2
        score = 0.4 + 0.1 * math.log(anchors) + 0.05 * (selector == "anchor") + 0.01 * seed
        if not is_last:
            losses = [1.0 / step + 0.3 + 0.01 * seed for step in range(1, 8 if runs_still else 501)]
            scores = {task: {"right": score - gap, "shuffled": 0.2, "none": 0.1} for task, gap in TASKS.items()}
            write_stage(
                trial / "finetune", losses, {} if runs_still else scores, tokens=anchors,
                config=config(seed, selector, anchors), state="LOCK" if runs_still else "DONE",
            )  # fmt: skip
            if with_media and not runs_still:
                write_media(trial / "finetune")
        (trial / "log.txt").write_text("step 1\nRuntimeError: <planted>\n")
        state = "failed" if is_last else "running" if runs_still else "done"
        (trial / "trial.json").write_text(json.dumps({
            "id": trial.name, "point": point, "state": state, "seconds": 12.5, "exit_code": 1 if is_last else 0,
            "reason": "finetune ended with 1" if is_last else None,
            "runs": {"align": str(align), "finetune": str(trial / "finetune")},
        }))  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps({"points": listed}))
    return folder


ALIGNED = {"caption": {"right": 1.2}}
TASKS = {"scene": 0.0, "doc": 0.1}
