"""What a later reader needs to know about where a run came from: command, machine, versions, code; never a secret."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from anchorformer.errors import UserError
from train.run.identity import ROOT, code_digest, package_versions

RECORDED = (
    "CUDA_", "DS_", "GLOO_", "HEAD_", "HF_", "HTTP", "JOB_ID", "LD_LIBRARY_PATH", "MKL_", "NCCL_", "NODE_", "NVIDIA_",
    "OMP_", "PYTHON", "PYTORCH_", "SLURM_", "TOKENIZERS_", "TORCH", "TRITON_", "WANDB_", "http",
)  # fmt: skip
"""Beginnings of the variables that can change what a run does."""
SHOWN = (
    "CUDA_", "DS_", "GLOO_", "HEAD_ADDR", "HEAD_PORT", "HF_DATASETS_", "HF_ENDPOINT", "HF_HOME", "HF_HUB_",
    "HTTPS_PROXY", "HTTP_PROXY", "JOB_ID", "LD_LIBRARY_PATH", "MKL_", "NCCL_", "NODE_RANK", "NVIDIA_", "OMP_", "PYTHON",
    "PYTORCH_", "SLURM_ARRAY_", "SLURM_CLUSTER_NAME", "SLURM_CPU", "SLURM_DISTRIBUTION", "SLURM_GPU", "SLURM_JOB",
    "SLURM_LOCALID", "SLURM_MEM_", "SLURM_NNODES", "SLURM_NODE", "SLURM_NPROCS", "SLURM_NTASKS", "SLURM_PROCID",
    "SLURM_RESTART_COUNT", "SLURM_STEP", "SLURM_SUBMIT_", "SLURM_TASK", "TOKENIZERS_PARALLELISM", "TORCH", "TRITON_",
    "WANDB_DIR", "WANDB_MODE", "WANDB_PROJECT", "http_proxy", "https_proxy",
)  # fmt: skip
"""Beginnings of those whose values are known to be no secret; of the others only that they are set is recorded."""
SECRET = re.compile(
    r"key(?!_value_heads)|token(?!izer|_budget)|secret|passw|pwd|credential|auth(?!or(?!i))|jwt|cookie|bearer|signature"
    r"|(?<![a-z])(?:pat|sig)(?![a-z])",
    re.IGNORECASE,
)
"""What a name sounds like that stands for a secret; `num_key_value_heads` and `token_budget` are of our configs."""
PLACES = frozenset({"PWD", "OLDPWD", "SSH_AUTH_SOCK", "XAUTHORITY"})
"""Variables that only sound like it: each names a place on this machine, which messages have to be able to say."""
SHORTEST = 6
"""Characters from which a value is looked for in messages: a shorter one would be found in ordinary words."""
MASK = "***"


def facts(command: Sequence[str]) -> dict[str, Any]:
    """The environment of this attempt."""
    return {
        "command": [mask_argument(word) for word in command],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(), "python": platform.python_version(), "versions": package_versions(),
        **git_state(), "code": code_digest(), "variables": variables(os.environ),
    }  # fmt: skip


def git_state() -> dict[str, Any]:
    """Commit, whether there are changes beside it, and their hash; None where git cannot tell."""
    changes = _git("diff", "HEAD")
    return {
        "commit": _git("rev-parse", "HEAD"), "uncommitted_changes": bool(_git("status", "--porcelain")),
        "changes_sha256": hashlib.sha256(changes.encode()).hexdigest() if changes else None,
    }  # fmt: skip


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that can change what a run does, with the values that are known to be no secret."""
    return {name: _shown(name, value) for name, value in sorted(environment.items()) if name.startswith(RECORDED)}


def mask_argument(word: str) -> str:
    """An argument of the command line without what follows a name that sounds like a secret."""
    return mask_address(re.sub(rf"((?i:{SECRET.pattern})[\w\-]*['\"]?\s*[=:]).*", rf"\1{MASK}", word, flags=re.DOTALL))


def mask_address(text: str) -> str:
    """An address without the user and password in front of its host (they may hold any character), and its query."""
    return re.sub(r"(://[^\s?]*\?)\S+", rf"\1{MASK}", re.sub(r"(?<=://).*@", f"{MASK}@", text))


def mask_values(text: str) -> str:
    """A message without the values of this process' variables that sound like secrets."""
    for value in _secrets():
        text = text.replace(value, MASK)
    return text


@contextmanager
def discreet() -> Iterator[None]:
    """A block whose mistakes leave it without the secrets of the environment, whoever prints or keeps them."""
    try:
        yield
    except UserError as error:
        texts = {name: mask_values(getattr(error, name)) for name in ("found", "expected", "remedy")}
        raise type(error)(mask_values(error.what), **texts) from None


class Discreet(logging.Formatter):
    """Writes messages and tracebacks without the secrets of the environment."""

    def format(self, record: logging.LogRecord) -> str:
        """The whole text of the record, masked."""
        return mask_values(super().format(record))


def _shown(name: str, value: str) -> str:
    if SECRET.search(name) or not name.startswith(SHOWN):
        return MASK
    if name.lower().endswith("_proxy"):
        value = re.sub(r"^(\w+://)?.*@", rf"\1{MASK}@", value)  # here an address may come without its scheme
    return mask_address(value)


def _secrets() -> list[str]:
    # The longest first, because one may be a part of another.
    named = {name: value for name, value in os.environ.items() if SECRET.search(name) and name not in PLACES}
    found = {value for value in named.values() if len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
