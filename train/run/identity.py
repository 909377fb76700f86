"""What a run is made of, by hash: two attempts at one run have to agree on it, and so have all ranks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from anchorformer.schema import to_plain
from evals.run_keys import NOT_DECISIVE, without
from train.config import RunConfig

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
ROOMS = ("anchorformer", "data", "evals", "train")
PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "hydra-core", "tokenizers", "safetensors", "numpy")
MAY_CHANGE = (
    *NOT_DECISIVE, "repro", "rehearse", "zero", "model.published", "data.num_workers", "data.token_budget",
    "data.on_bad_image", "data.max_dropped_share", "hardware.max_restarts", "hardware.ranks", "hardware.nodes",
    "hardware.micro_batch", "hardware.card", "hardware.memory_gb", "hardware.activation_checkpointing",
    "hardware.compile", "hardware.kernels",
)  # fmt: skip
"""Keys of the config that a resumed run may have otherwise. Beside what decides nothing: how a step is cut and
computed, because the next machine may be another; what happens to bad images, because who meets one must be able to go
on."""

CAME_LATER: dict[str, dict[str, Any]] = {
    "stage": {"lora": None},
    "zero": {"offload_optimizer": "none", "offload_parameters": "none", "nvme_path": None, "hpz": False, "qwz": False,
             "qgz": False},
}  # fmt: skip
"""Keys that older configurations do not have, and what they mean there: then they are left out of hashes, so that a run
that was begun before them goes on, and a trial of a sweep keeps its id."""


@dataclass(frozen=True)
class Identity:
    """Everything that decides a run's numbers.

    Attributes:
        config: hash of the configuration without `MAY_CHANGE`.
        start: sha256 of the start folder's manifest: backbones and connector that the run began with.
        data: fingerprints of what the samples are made of, by name.
        order: hash of the samples' order over the whole run.
        trained: hash of the names and shapes of the trained parameters.
        code: hash of this repository's Python files; may change, is told.
        versions: of the packages; may change, are told.
    """

    config: str
    start: str
    data: dict[str, str]
    order: str
    trained: str
    code: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


MUST_STAY = ("config", "start", "data", "order", "trained")


def numbers(config: RunConfig) -> dict[str, Any]:
    """The configuration without what may change between a run and its resumption."""
    return without(hashed(config), MAY_CHANGE)


def hashed(config: RunConfig) -> dict[str, Any]:
    """The values of a configuration as they are hashed: without those of `CAME_LATER` that say what was so before."""
    plain: dict[str, Any] = to_plain(config)
    for group, before in CAME_LATER.items():
        for key, value in before.items():
            if plain[group][key] == value:
                del plain[group][key]
    return plain


def numbers_digest(config: RunConfig) -> str:
    """Hash of `numbers`."""
    return hashlib.sha256(json.dumps(numbers(config), sort_keys=True).encode()).hexdigest()


@cache
def code_digest() -> str:
    """Hash of the Python files of all rooms as they lay on disk when first asked for, whatever git knows of them."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that numbers depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def differences(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted paths at which two plain values differ, with both values."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            yield from differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif one != other:
        yield path, one, other


def identify(config: RunConfig, start: Path, data: dict[str, str], order: str, trained: str) -> Identity:
    """The identity of a run that is about to start, as this process sees it."""
    from anchorformer.model_folder import MANIFEST, sha256  # imports torch, which a command line does not need

    return Identity(
        config=numbers_digest(config), start=sha256(start / MANIFEST), data=data, order=order, trained=trained,
        code=code_digest(), versions=package_versions(),
    )  # fmt: skip


def check_same_data(before: Identity, data: Mapping[str, str], when: str) -> None:
    """Compares the data before anything else is known: a position means the same samples only if they are equal.

    Raises:
        UserError: something that the samples are made of is not as it was, or not there; all of it is named.
    """
    changed = [name for name in sorted(before.data.keys() | data.keys()) if before.data.get(name) != data.get(name)]
    if changed:
        raise UserError(
            f"the data have changed since {when}: {', '.join(changed)}",
            found="; ".join(f"{name}: {data.get(name, 'absent')}" for name in changed),
            expected="; ".join(f"{name}: {before.data.get(name, 'absent')}" for name in changed),
            remedy="restore the data and the libraries, or start a new run with init_from",
        )  # fmt: skip


def check_same_run(before: Identity, now: Identity, when: str) -> None:
    """Compares what a run was made of with what it is made of now; what may change is told.

    Raises:
        UserError: something that the numbers depend on is another.
    """
    check_same_data(before, now.data, when)
    changed = [key for key in MUST_STAY if getattr(before, key) != getattr(now, key)]
    if changed:
        raise UserError(
            f"this is not the run of {when}: its {', '.join(MEANING[key] for key in changed)} changed",
            found="; ".join(f"{key} {getattr(now, key)[:12]}" for key in changed),
            expected="; ".join(f"{key} {getattr(before, key)[:12]}" for key in changed),
            remedy="resume with the configuration, the start folder and the code of the run, or start a new run",
        )  # fmt: skip
    if before.code != now.code:
        log.warning("the code has changed since %s (%.12s, now %.12s)", when, before.code, now.code)
    for name, was, is_now in differences(before.versions, now.versions):
        log.warning("%s is another version than at %s: %s, now %s", name, when, was, is_now)


MEANING = {
    "config": "configuration", "start": "start folder", "data": "data", "order": "order of samples",
    "trained": "set of trained parameters",
}  # fmt: skip


def seen_first(config: RunConfig) -> dict[str, Any]:
    """What ranks have to agree on before anything that they do together depends on it."""
    return {"configuration": config.digest, "code": code_digest(), "versions": package_versions()}


def check_ranks_agree(ranks: list[dict[str, Any]]) -> None:
    """Compares what all ranks have found on their nodes: `seen_first`, and the whole identity once it is known.

    Raises:
        UserError: a rank reads another config, code, data or library than rank 0.
    """
    first = ranks[0]
    for rank, facts in enumerate(ranks):
        found = list(differences(facts, first))
        if found:
            raise UserError(
                f"rank {rank} is not at the same run as rank 0",
                found="; ".join(f"{key}: {mine}" for key, mine, _ in found[:3]),
                expected="; ".join(f"{key}: {others}" for key, _, others in found[:3]),
                remedy="give all nodes the same checkout, environment, data and run folder",
            )  # fmt: skip
