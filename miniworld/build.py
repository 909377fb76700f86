"""A budget built once: world, tokenizer and backbones in one folder, found again by the hash of what made them."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from anchorformer.errors import UserError
from anchorformer.schema import to_plain
from miniworld.clip import PREPROCESSOR, attention_entropy, recall_at_1, train_clip
from miniworld.config import ClipConfig, LlamaConfig, MiniWorldConfig
from miniworld.llama import GATED, exact_match, train_llama
from miniworld.tokens import save_tokenizer, train_tokenizer
from miniworld.write import write_world

MANIFEST = "manifest.json"
"""Written last: a folder without it is unfinished and is built again."""

Report = dict[str, Any]

log = logging.getLogger(__name__)


def build(config: MiniWorldConfig, out: Path) -> Path:
    """Writes `world/`, `backbones/clip`, `backbones/llama` and the manifest below `out`, unless they are there.

    Raises:
        UserError: the language model did not learn to look things up (see `LlamaConfig.gate`).
    """
    out.mkdir(parents=True, exist_ok=True)
    # A second caller waits here and then finds everything done, instead of writing into the same folder.
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build_alone(config, out)


def _build_alone(config: MiniWorldConfig, out: Path) -> Path:
    manifest = out / MANIFEST
    if manifest.is_file() and json.loads(manifest.read_text())["digest"] == config.digest:
        log.info("mini world: %s is up to date", out)
        return out
    manifest.unlink(missing_ok=True)
    for part in ("world", "backbones"):
        shutil.rmtree(out / part, ignore_errors=True)
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    records = write_world(config.world, out / "world")
    seconds["world"] = time.perf_counter() - started
    log.info("mini world: %d records in %.0f s", sum(records.values()), seconds["world"])

    started = time.perf_counter()
    llama_folder, clip_folder = out / "backbones" / "llama", out / "backbones" / "clip"
    save_tokenizer(train_tokenizer(), llama_folder)
    seconds["tokenizer"] = time.perf_counter() - started
    started = time.perf_counter()
    # One process with one thread each: operations this small hardly gain from a second thread, and a fixed thread
    # count makes the result the same on machines with other numbers of cores.
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        clip = pool.submit(_clip, config.clip, llama_folder, clip_folder)
        llama = pool.submit(_llama, config.llama, llama_folder)
        reports = {"clip": clip.result(), "llama": llama.result()}
    seconds["backbones"] = time.perf_counter() - started
    _check_gate(reports["llama"], config.llama)
    content = {
        "digest": config.digest,
        "config": to_plain(config),
        "records": records,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        **reports,
    }
    unfinished = manifest.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    unfinished.replace(manifest)
    return out


def _clip(config: ClipConfig, tokenizer_folder: Path, out: Path) -> Report:
    torch.set_num_threads(1)
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model, loss = train_clip(config, tokenizer)
    model.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1), encoding="utf-8")
    return {
        "loss": loss,
        "recall_at_1_of_100": recall_at_1(model, tokenizer),
        "cls_attention_entropy": attention_entropy(model, tokenizer),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _llama(config: LlamaConfig, folder: Path) -> Report:
    torch.set_num_threads(1)
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, loss = train_llama(config, tokenizer)
    model.save_pretrained(folder)
    return {
        "loss": loss,
        "text_exact_match": exact_match(model, tokenizer),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _check_gate(report: Report, config: LlamaConfig) -> None:
    measured = report["text_exact_match"]
    worst = min(GATED, key=lambda template: measured[template])
    if measured[worst] < config.gate:
        raise UserError(
            "the tiny language model did not learn to look things up in text",
            found=f"exact match {measured[worst]:.2f} on {worst}",
            expected=f"at least {config.gate:.2f} on each of {', '.join(GATED)}",
            remedy="build with more steps (--llama-steps) or another seed (--seed); the copy circuit forms suddenly, "
            "and not with every seed as early",
        )
