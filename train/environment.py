"""What a later reader needs to know about where a run came from: command, machine, versions, code; never a secret."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from train.identity import ROOT, code_digest, package_versions

RECORDED = (
    "CUDA_", "DS_", "GLOO_", "HEAD_", "HF_", "HTTP", "JOB_ID", "LD_LIBRARY_PATH", "MKL_", "NCCL_", "NODE_", "NVIDIA_",
    "OMP_", "PYTHON", "PYTORCH_", "SLURM_", "TOKENIZERS_", "TORCH", "TRITON_", "WANDB_", "http",
)  # fmt: skip
"""Beginnings of the variables that can change what a run does."""
SECRET = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
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
    """The variables that can change what a run does, secrets masked by their names and inside of addresses."""
    kept = {name: value for name, value in environment.items() if name.startswith(RECORDED)}
    return {name: MASK if SECRET.search(name) else mask_address(value) for name, value in sorted(kept.items())}


def mask_argument(word: str) -> str:
    """An argument of the command line without what follows a name that sounds like a secret."""
    name, equals, _ = word.partition("=")
    return f"{name}={MASK}" if equals and SECRET.search(name.rsplit(".", 1)[-1]) else mask_address(word)


def mask_address(text: str) -> str:
    """An address without the user and password in front of its host."""
    return re.sub(r"(?<=://)[^/@\s]+@", f"{MASK}@", text)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
