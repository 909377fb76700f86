"""Everything between a composed config and its ranks: inputs checked, start folder made, run folder written once."""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
import platform
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from anchorformer.errors import UserError
from anchorformer.schema import parse_plugin, plugin_to_plain, to_plain
from data.mixture import Mixture, open_sources
from train.compose import ROOT
from train.config import RunConfig
from train.folder import RunFolder, write_atomically
from train.start import check_devices

PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "hydra-core", "tokenizers", "safetensors", "numpy")


def prepare(config: RunConfig, command: Sequence[str], *, starts_here: bool = True) -> RunFolder:
    """Checks what the config names, cheapest first, then makes the start folder and the run folder.

    Args:
        command: what the user typed, for environment.json.
        starts_here: whether this machine is the one whose devices the ranks will need.

    Returns:
        the run folder, ready for `train.start`.

    Raises:
        UserError: a file or folder missing or not in its format, parts of the model that do not fit each other, a start
            folder that is damaged or of another shape, a run folder that exists already, or a stored config that
            differs from this one where the run is resumed; fewer CUDA devices than ranks.
    """
    folder = run_folder(config)
    check_files(config)
    if starts_here:
        check_devices(config)
    config = check_parts(config)
    if folder.config.is_file():
        _compare(config, folder.read_config(), folder.config)
        _compare_start(folder)
        # What the last attempt ended with says nothing about this one.
        for marker in (folder.halted, folder.interrupted):
            marker.unlink(missing_ok=True)
    else:
        start = make_start_folder(config)
        check_samples(config, start)
        _create(folder.path, config.resume != "never")
        write_atomically(folder.path / "start.txt", f"{start}\n{_manifest_hash(start)}\n")
        write_atomically(folder.path / "environment.json", json.dumps(environment_facts(command), indent=2) + "\n")
    # Last: a folder with a config is one that ranks can be started on.
    write_atomically(folder.config, yaml.safe_dump(to_plain(config), sort_keys=False))
    return folder


def run_folder(config: RunConfig) -> RunFolder:
    """Where this run lives.

    Raises:
        UserError: a name that leads out of `output_root`, or a run that exists while it is not to be resumed.
    """
    root = Path(config.output_root)
    folder = root / config.run
    if Path(config.run).is_absolute() or ".." in Path(config.run).parts or folder == root:
        raise UserError(
            "the run's name leads out of output_root", found=f"run={config.run}", expected="a name such as first/align",
            remedy="set output_root=... for another place",
        )  # fmt: skip
    if folder.exists() and config.resume == "never":
        raise UserError(
            f"the run {config.run} exists already", found=folder, expected="a folder that does not exist",
            remedy="choose another run=..., or continue this one with resume=auto",
        )  # fmt: skip
    return RunFolder(folder)


def is_done(config: RunConfig) -> bool:
    """Whether a run that may be resumed has nothing left to do.

    Raises:
        UserError: it was done with another config, or started from a model that has been replaced since; what it left
            is then not what this command asks for.
    """
    if config.resume == "never":
        return False
    folder = run_folder(config)
    if not folder.done.exists():
        return False
    _compare(check_parts(config), folder.read_config(), folder.config)
    _compare_start(folder)
    return True


def check_files(config: RunConfig) -> None:
    """Opens what the config names on disk; the sources' annotations are parsed here once, for all ranks."""
    if config.init_from:
        resolve_model(config.init_from, Path(config.output_root))
    if config.resume not in ("never", "auto") and not Path(config.resume).is_dir():
        raise UserError(
            "resume names no checkpoint", found=f"resume={config.resume}",
            expected="never, auto, or a folder under <run>/state/", remedy="use resume=auto for the newest one",
        )  # fmt: skip
    open_sources(config.data)


def check_parts(config: RunConfig) -> RunConfig:
    """Parses the model's plug-ins; returns the config with every one of their values written out."""
    from anchorformer.connectors.base import PACKAGE as CONNECTORS
    from anchorformer.connectors.base import ConnectorConfig
    from anchorformer.selectors.base import PACKAGE as SELECTORS
    from anchorformer.selectors.base import SelectorConfig

    selector = parse_plugin(SelectorConfig, config.model.selector, SELECTORS, "model.selector")
    connector = parse_plugin(ConnectorConfig, config.model.connector, CONNECTORS, "model.connector")
    model = replace(config.model, selector=plugin_to_plain(selector), connector=plugin_to_plain(connector))
    return replace(config, model=model)


def make_start_folder(config: RunConfig) -> Path:
    """The model folder that every rank loads: the one named by `init_from`, or a fresh one, assembled once.

    A fresh one is kept under `<output_root>/models/` by the hash of what it is made from.
    """
    from anchorformer.assemble import assemble
    from anchorformer.weights import check_folder

    model = config.model
    if config.init_from:
        folder = resolve_model(config.init_from, Path(config.output_root))
    else:
        made_from = {
            "model": to_plain(model), "seed": config.seed, "template": config.stage.template,
            "files": [_fingerprint(Path(name)) for name in (model.vision, model.language_model)],
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        folder = Path(config.output_root).resolve() / "models" / digest[:16]
        if not folder.exists():
            # Two launches at once each write their own; the first to finish gives the name.
            mine = folder.with_name(f"{folder.name}-{secrets.token_hex(4)}")
            assemble(
                model.vision, model.language_model, model.selector, model.connector, mine,
                template=config.stage.template, seed=config.seed,
            )  # fmt: skip
            try:
                mine.rename(folder)
            except OSError:
                shutil.rmtree(mine)
                if not folder.is_dir():
                    raise
    check_folder(folder, model.selector, model.connector, every_hash=True)
    return folder


def check_samples(config: RunConfig, start: Path) -> None:
    """Measures every sample with the run's own processor, once for all ranks, which find the counts in the cache.

    Raises:
        UserError: a template that does not fit the tokenizer, and what the over-length rule refuses.
    """
    from transformers import AutoProcessor

    import anchorformer.auto  # noqa: F401 (makes the processor known to transformers)

    processor = AutoProcessor.from_pretrained(start, local_files_only=True)
    Mixture(config.data, processor.with_template(config.stage.template))


def resolve_model(name: str, output_root: Path) -> Path:
    """The model folder that `init_from` means: the folder itself, or the `model/` of a finished run.

    Raises:
        UserError: nothing there (with the runs near by), or a run that has not finished.
    """
    folder = Path(name).resolve()
    run = RunFolder(folder)
    if run.config.is_file():
        if not run.done.exists():
            raise UserError(
                "init_from names a run that is not done", found=f"{name} without DONE",
                expected="a finished run, or a model folder",
                remedy="finish that run first: its own command with resume=auto",
            )  # fmt: skip
        folder = run.model
    if not (folder / "config.json").is_file():
        near = _runs_near(Path(name), output_root)
        raise UserError(
            "init_from names no model", found=f"{name} ({'no config.json' if folder.is_dir() else 'no such folder'})",
            expected=" or ".join(f"'{run}'" for run in near) + "?" if near else
            f"a run ({output_root}/<run>) or a model folder",
            remedy=f"e.g. init_from={near[0]}" if near else "check the path",
        )  # fmt: skip
    return folder


def _runs_near(path: Path, output_root: Path) -> list[Path]:
    """What may have been meant: the name below `output_root`, the runs inside of that folder, or one spelt like it."""
    places = (path, output_root / path)
    inside = [config.parent for place in places for config in sorted(place.glob("*/config.yaml"))]
    near = [place for place in places if (place / "config.yaml").is_file()] + inside
    if not near:
        runs = [config.parent for depth in ("*", "*/*") for config in output_root.glob(f"{depth}/config.yaml")]
        near = [Path(name) for name in difflib.get_close_matches(str(path), [str(run) for run in sorted(runs)])]
    return list(dict.fromkeys(near))[:3]


def environment_facts(command: Sequence[str]) -> dict[str, Any]:
    """What a later reader needs to know about where a run came from."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {
        "command": list(command), "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(), "python": platform.python_version(), "versions": versions,
        "commit": _git("rev-parse", "HEAD"), "uncommitted_changes": bool(_git("status", "--porcelain")),
    }  # fmt: skip


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Dotted paths at which two plain values differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            yield from differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif one != other:
        yield f"{path} (was {other}, now {one})"


def _compare(config: RunConfig, before: RunConfig, path: Path) -> None:
    from train.checkpoint import numbers_digest

    if numbers_digest(config) != numbers_digest(before):
        found = differences(to_plain(replace(config, resume=before.resume)), to_plain(before))
        raise UserError(
            f"the run {config.run} was started with another config", found="; ".join(found), expected=f"as in {path}",
            remedy="resume with the same values, or start another run",
        )  # fmt: skip


def _compare_start(folder: RunFolder) -> None:
    found, expected = _manifest_hash(folder.start), folder.start_hash
    if found != expected:
        raise UserError(
            f"the model that {folder.path} started from has been replaced", found=f"{folder.start} ({found[:12]})",
            expected=f"the one of its start ({expected[:12]})", remedy="start another run from the new model",
        )  # fmt: skip


def _manifest_hash(folder: Path) -> str:
    from anchorformer.weights import MANIFEST, sha256

    manifest = folder / MANIFEST
    return sha256(manifest) if manifest.is_file() else "no manifest"


def _create(folder: Path, resumed: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A run to be resumed may have been stopped before it wrote its config.
        folder.mkdir(exist_ok=resumed)
    except FileExistsError:
        raise UserError(
            f"the run folder {folder} has appeared meanwhile", found="another launch of the same run",
            expected="one launch per run", remedy="choose another run=...",
        ) from None  # fmt: skip


def _fingerprint(folder: Path) -> list[tuple[str, int, int]]:
    # A hub id has none: hub folders are immutable per revision, local ones may be written again in place.
    files = sorted(path for path in folder.glob("*") if path.is_file()) if folder.is_dir() else []
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
