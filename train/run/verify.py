"""Whether a run folder is what the run has left: every file that has a hash is read and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anchorformer.errors import UserError
from anchorformer.model_folder import MANIFEST, sha256
from anchorformer.weights import check_folder
from train.checkpoint import retention, seal, state
from train.checkpoint.resume import check_metrics
from train.distributed import alone
from train.run.folder import RunFolder
from train.run.identity import MUST_STAY


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        problem: what is wrong with it; None where nothing is.
    """

    what: str
    problem: str | None


def verify(folder: RunFolder) -> Iterator[Finding]:
    """Looks at the sealed files, the start folder, every checkpoint with the record so far, and the trained model.

    Logs are not looked at: they prove nothing, and every attempt adds to them.

    Raises:
        UserError: it is not a run folder.
    """
    folder.read_config()
    yield Finding("config, environment, start, identity", "; ".join(folder.broken_seals()) or None)
    yield Finding("start folder", _start_problem(folder))
    identity = json.loads(folder.identity.read_text()) if folder.identity.is_file() else None
    for found in retention.listing(folder.state):
        name = found.folder.name
        if name.startswith((retention.TEMPORARY, retention.TRASH)):
            continue  # what a kill has left; the next save removes it
        problem = found.problem or seal.damage(found.folder, alone())
        if problem is None and name.startswith("step-"):
            problem = _contradiction(folder, found, identity)
        yield Finding(f"{folder.state.name}/{name}", problem)
    if folder.done.is_file():
        yield Finding(folder.model.name, _model_problem(folder.model))


def _start_problem(folder: RunFolder) -> str | None:
    try:
        start, expected = folder.start, folder.start_hash
        check_folder(start, every_hash=True)
    except UserError as error:
        return error.what
    return None if sha256(start / MANIFEST) == expected else f"{start} is not the one that the run began with"


def _contradiction(folder: RunFolder, found: retention.Found, identity: dict[str, object] | None) -> str | None:
    """What a checkpoint says that the rest of the folder does not."""
    saved = state.parse(state.read(found.folder)).identity
    if identity is not None:
        others = [key for key in MUST_STAY if identity[key] != saved.to_dict()[key]]
        if others:
            return f"its {', '.join(others)} is not that of {folder.identity.name}"
    try:
        check_metrics(found.folder, folder)
    except UserError as error:
        return error.what
    return None


def _model_problem(model: Path) -> str | None:
    try:
        check_folder(model, every_hash=True)
    except UserError as error:
        return error.what
    return None
