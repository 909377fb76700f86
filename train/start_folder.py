"""The model folder that a run starts from: named by it, or assembled once and kept for others alike."""

from __future__ import annotations

import difflib
import hashlib
import json
import secrets
import shutil
from pathlib import Path

from anchorformer.errors import UserError
from anchorformer.schema import to_plain
from train.config import RunConfig
from train.run.folder import RunFolder


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
                template=config.stage.template, tiling=to_plain(model.tiling), integration=model.integration,
                seed=config.seed,
            )  # fmt: skip
            try:
                mine.rename(folder)
            except OSError:
                shutil.rmtree(mine)
                if not folder.is_dir():
                    raise
    check_folder(
        folder, model.selector, model.connector, tiling=model.tiling, integration=model.integration, every_hash=True
    )
    return folder


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


def manifest_hash(folder: Path) -> str:
    """Hash of the folder's manifest, which has one of every file in it."""
    from anchorformer.model_folder import MANIFEST, sha256

    manifest = folder / MANIFEST
    return sha256(manifest) if manifest.is_file() else "no manifest"


def _fingerprint(folder: Path) -> list[tuple[str, int, int]]:
    # A hub id has none: hub folders are immutable per revision, local ones may be written again in place.
    files = sorted(path for path in folder.glob("*") if path.is_file()) if folder.is_dir() else []
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
