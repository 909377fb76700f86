"""Bytes of a folder that lies on a disk or anywhere fsspec reaches: by range, tried again, in words where it fails."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import AsyncFileSystem
from tqdm import tqdm

from anchorformer.errors import UserError
from data.arrow import written_whole

T = TypeVar("T")

log = logging.getLogger(__name__)

WAITS = (0.5, 2.0, 8.0, 30.0)
"""Seconds before each further try to read something."""

SECONDS = 60
"""Longest single read; its answer is at most CHUNK bytes, or one image."""

CHUNK = 8 << 20
"""Bytes of a file that are asked for at once where all of it is wanted."""

VENDOR_ERRORS = {
    "aiohttp": "ClientError",
    "botocore.exceptions": "BotoCoreError",
    "gcsfs.retry": "HttpError",
    "httpx": "HTTPError",
    "httpx2": "HTTPError",
}
"""Module -> what a file system that is built on it raises beside OSError."""

FINAL = frozenset({400, 401, 403, 404, 405, 410, 451})
"""HTTP states that another try does not change."""


class Storage:
    """One folder. A copy that was sent to another process, by pickle or by fork, opens the file system there.

    Args:
        place: path or fsspec URL of the folder (https://, s3://, gs://, hf://, ...). Keys are the file system's affair
            (its environment variables and files): a place is written into logs and run folders, so it may hold none.

    Raises:
        UserError: a place with a user, password or query in it, or a file system whose package is not installed.
    """

    def __init__(self, place: str) -> None:
        self.place = check_place(place).rstrip("/")
        self._opened: tuple[int, Any, str] | None = None
        self._open()

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of a file: `length` from `start` on, or all of it.

        Raises:
            UserError: no such file, no right to it, fewer or more bytes than asked for, or no answer after all tries.
        """

        def once() -> bytes:
            file_system, root = self._open()
            limits = {} if length is None else {"start": start, "end": start + length}
            found: bytes = file_system.cat_file(f"{root}/{name}", **limits, **self._patience(file_system))
            if length is not None and len(found) != length:
                raise WrongLength(len(found), length)
            return found

        wanted = "the file" if length is None else f"{length} bytes from byte {start} on"
        return self._tried(name, once, wanted)

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            UserError: as `read` does.
        """

        def once() -> int:
            file_system, root = self._open()
            size: int | None = file_system.info(f"{root}/{name}", **self._patience(file_system))["size"]
            if size is None:
                raise WrongLength(-1, 0)
            return size

        return self._tried(name, once, "a file whose size the server tells")

    def copy(self, name: str, target: Path, size: int, sha256: str) -> None:
        """Brings a file of known size and hash to `target`, where it appears whole.

        Raises:
            UserError: as `read` does, or the content is another.
        """
        digest = hashlib.sha256()
        with (
            written_whole(target) as draft,
            draft.open("wb") as file,
            tqdm(desc=f"fetching {name}", total=size, unit="B", unit_scale=True, delay=2, mininterval=0.5) as progress,
        ):
            for start in range(0, size, CHUNK):
                part = self.read(name, start, min(CHUNK, size - start))
                digest.update(part)
                file.write(part)
                progress.update(len(part))
            if digest.hexdigest() != sha256:
                raise UserError(
                    f"{self.place}/{name} is not the file that the manifest means",
                    found=f"sha256 {digest.hexdigest()}",
                    expected=f"sha256 {sha256}", remedy="copy the folder again, all files from one place",
                )  # fmt: skip

    def _tried(self, name: str, once: Callable[[], T], expected: str) -> T:
        for wait in (*WAITS, None):
            try:
                return once()
            except _errors() as error:
                found = _words(error)
                if wait is None or _is_final(error):
                    raise UserError(
                        f"{self.place}/{name} cannot be read", found=found, expected=expected, remedy=_remedy(error)
                    ) from None
                log.warning("%s/%s: %s; trying again in %g s", self.place, name, found, wait)
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _open(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                # An instance of its own: the shared one belongs to the process that made it, with its event loop.
                file_system, root = fsspec.url_to_fs(self.place, skip_instance_cache=True)
            except (ImportError, ValueError) as error:
                raise UserError(
                    f"{self.place} cannot be reached", found=error, expected="a folder, or a URL that fsspec knows",
                    remedy="install the package that fsspec names for it (s3fs, gcsfs, ...), or mount the folder",
                ) from None  # fmt: skip
            self._opened = os.getpid(), file_system, root.rstrip("/")
        return self._opened[1], self._opened[2]

    @staticmethod
    def _patience(file_system: Any) -> dict[str, Any]:
        return {"timeout": SECONDS} if isinstance(file_system, AsyncFileSystem) else {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class WrongLength(Exception):
    """Bytes found, -1 where the server does not tell their number, and asked for."""


def check_place(place: str) -> str:
    """A path or URL that may be written down.

    Raises:
        UserError: it holds a user, a password or a query.
    """
    parts = urlsplit(place)
    if parts.scheme and (parts.username or parts.password or parts.query):
        raise UserError(
            "a URL holds what must not be written down", found=f"{parts.scheme}://... with a user, password or query",
            expected="a plain URL: it is written into logs and run folders",
            remedy="give the key to the file system: its environment variables or files (AWS_PROFILE, ~/.netrc, ...)",
        )  # fmt: skip
    return place


def _errors() -> tuple[type[Exception], ...]:
    """What reading may raise; vendors that are not loaded cannot have raised anything."""
    loaded = ((sys.modules.get(module), name) for module, name in VENDOR_ERRORS.items())
    return (OSError, WrongLength, *(getattr(module, name) for module, name in loaded if module is not None))


def _status(error: Exception) -> int | None:
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _is_final(error: Exception) -> bool:
    if isinstance(error, WrongLength):  # more: a server that does not know ranges, and sends the whole file each time
        found, asked = error.args
        return bool(found > asked)
    return isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)) or _status(error) in FINAL


def _words(error: Exception) -> str:
    """What happened, without the URL that vendors repeat: after redirects it may hold a signature."""
    if isinstance(error, WrongLength):
        found, asked = error.args
        return "no size" if found < 0 else f"{found} bytes" + (", the request for a range ignored" * (found > asked))
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, TimeoutError):
        return f"no answer within {SECONDS} s"
    status = _status(error)
    if status is not None:
        return f"state {status}"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else ""
    return f"{type(error).__name__}{f': {reason}' if reason else ''}"


def _remedy(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "copy the missing file there again, or correct the place"
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return "give this machine the right to read it"
    if isinstance(error, WrongLength):
        return "compare the file's size with the manifest, and copy it again; a server must answer requests for ranges"
    return "look after the server or the network, then start again: a run resumes at its last checkpoint"
