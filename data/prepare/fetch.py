"""One file brought to this disk: resumed where it broke off, in its right size, never half under its name."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import http.client
import io
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import fsspec
from tqdm import tqdm

from anchorformer.errors import UserError
from data.arrow import written_whole
from data.disk import cannot_write
from data.prepare.origin import Origin

log = logging.getLogger(__name__)

WAITS = (1.0, 5.0, 20.0, 60.0)
"""Seconds before each further try that has brought nothing; one that has brought something begins the row anew."""

SECONDS = 60
"""Longest silence of a server."""

CHUNK = 1 << 20

FINAL = frozenset({400, 401, 403, 404, 405, 410, 451})
"""HTTP states that another try does not change."""

OF_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})
"""What an OSError says where this disk has refused; others come from the network."""

PAGES = (b"<!doctype html", b"<html")

AGAIN = "call the command again: it goes on"


@dataclass(frozen=True)
class Fetched:
    """A file that is complete."""

    bytes: int
    sha256: str


class Broken(Exception):
    """This try has ended early; the next one may not."""


class Stale(Broken):
    """What is there is of another file than the one that would be gone on with."""


@dataclass
class _Answer:
    """A stream that begins at byte `start` of `total`, of the file in its state `version`."""

    stream: IO[bytes]
    start: int
    total: int | None
    version: str | None
    is_page: bool


def fetch(origin: Origin, target: Path, work: Path) -> Fetched:
    """Brings a file to `target`.

    Args:
        work: folder for what is not complete yet, on the same disk; a later call goes on with it.

    Raises:
        UserError: refused, not there, a web page in its place, broken off in every try, another size or checksum than
            the publisher states, or a disk without room.
    """
    part, note = work / f"{target.name}.part", work / f"{target.name}.part.json"
    try:
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        _bring(origin, part, note)
        sha256 = hash_of(part)
        if origin.sha256 is not None and sha256 != origin.sha256:
            part.unlink()
            raise UserError(
                f"{origin.shown} came with another checksum", found=f"sha256 {sha256}",
                expected=f"sha256 {origin.sha256}",
                remedy="fetch it again; if it stays so, the publisher has changed it or somebody else has"
                + (f"; {origin.stated_in} has the checksum of before" if origin.stated_in else ""),
            )  # fmt: skip
        size = part.stat().st_size
        part.replace(target)
        note.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        raise cannot_write(target, error, AGAIN) from None
    return Fetched(size, sha256)


def hash_of(path: Path) -> str:
    """The sha256 of a file, with a bar where that takes long."""
    digest = hashlib.sha256()
    with path.open("rb") as file, _bar(f"hashing {path.name}", path.stat().st_size, 0) as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _bring(origin: Origin, part: Path, note: Path) -> None:
    """Makes `part` complete."""
    waits = iter(WAITS)
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            if _attempt(origin, part, note):
                return
            found = "the connection ended early"
        except (Broken, http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                raise
            found = _words(error)
            if isinstance(error, Stale):
                part.unlink()
        if part.is_file() and part.stat().st_size > before:
            waits = iter(WAITS)
        wait = next(waits, None)
        if wait is None:
            there = part.stat().st_size if part.is_file() else 0
            raise UserError(
                f"{origin.shown} cannot be fetched", expected="the whole file",
                found=f"{found}, in {len(WAITS) + 1} tries; {there} bytes are there",
                remedy=f"look after the network, then {AGAIN}; or name a copy with mirror=",
            )  # fmt: skip
        log.warning("%s: %s; trying again in %g s", origin.shown, found, wait)
        time.sleep(wait)


def _attempt(origin: Origin, part: Path, note: Path) -> bool:
    """Goes on from where `part` ends; returns whether it is complete."""
    start = part.stat().st_size if part.is_file() else 0
    version = json.loads(note.read_text())["version"] if note.is_file() else None
    is_known = origin.sha256 is not None  # then the whole is compared, and its parts need not be
    if version is None and not is_known:  # nothing says that the rest would be of the same file
        start = 0
    with _opened(origin, start, None if is_known else version) as answer:
        if answer.total is not None and origin.size is not None and answer.total != origin.size:
            raise Broken(f"{answer.total} bytes in place of {origin.size}")
        if answer.start and (answer.start != start or not (is_known or answer.version == version)):
            raise Stale("the file has changed while it was fetched, and begins anew")
        if answer.is_page:
            raise _page(origin)
        if not answer.start:
            with written_whole(note) as draft:
                draft.write_text(json.dumps({"from": origin.shown, "version": answer.version}))
        size = answer.start
        with (
            part.open("ab" if answer.start else "wb") as file,
            _bar(f"fetching {part.stem}", answer.total, size) as bar,
        ):
            while chunk := answer.stream.read(CHUNK):
                if not size and chunk[:64].lstrip().lower().startswith(PAGES):
                    raise _page(origin)
                write(file, chunk)
                size += len(chunk)
                bar.update(len(chunk))
    return size == answer.total if answer.total is not None else True


def write(file: IO[bytes], chunk: bytes) -> None:
    """Into a file, on this disk."""
    file.write(chunk)


@contextlib.contextmanager
def _opened(origin: Origin, start: int, version: str | None) -> Iterator[_Answer]:
    if not origin.url.startswith(("http://", "https://")):
        with _from_file_system(origin, start) as answer:
            yield answer
        return
    url, keys = _addressed(origin.url)
    headers = {"Accept-Encoding": "identity", "User-Agent": "anchorformer"}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 (the scheme is checked above)
    for name, value in {**keys, **origin.headers}.items():
        request.add_unredirected_header(name, value)  # a key is for that host, not for where it sends us
    if start:
        request.add_header("Range", f"bytes={start}-")
        if version:
            request.add_header("If-Range", version)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:  # noqa: S310
            yield _answer_of(response)
    except urllib.error.HTTPError as error:
        total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if error.code == 416 and total == str(start):  # nothing behind the end: it was complete
            yield _Answer(io.BytesIO(), start, start, version, is_page=False)
        elif error.code == 416:
            raise Stale("the file is shorter than what is there, and begins anew") from None
        elif error.code in FINAL:
            raise UserError(
                f"{origin.shown} cannot be fetched", found=f"state {error.code} {error.reason}",
                expected="the published file",
                remedy="see the data set's page whether it has moved or wants a login; then give its url or mirror=",
            ) from None  # fmt: skip
        else:
            raise Broken(f"state {error.code}") from None


def _addressed(url: str) -> tuple[str, dict[str, str]]:
    """The URL as a request takes it, and the header that a user and password in it mean."""
    parts = urlsplit(url)
    keys = {}
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        keys["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, quote(parts.path, safe="/%"), parts.query, "")), keys


def _answer_of(response: Any) -> _Answer:
    headers = response.headers
    length = headers.get("Content-Length")
    start, total = 0, None if length is None else int(length)
    if response.status == 206:
        span, _, whole = headers["Content-Range"].removeprefix("bytes ").partition("/")
        start, total = int(span.partition("-")[0]), None if whole == "*" else int(whole)
    version = headers.get("ETag") or headers.get("Last-Modified")
    if version is not None and version.startswith("W/"):  # says that a file means the same, not that its bytes are
        version = headers.get("Last-Modified")
    return _Answer(response, start, total, version, headers.get_content_type() == "text/html")


@contextlib.contextmanager
def _from_file_system(origin: Origin, start: int) -> Iterator[_Answer]:
    try:
        file_system, path = fsspec.url_to_fs(origin.url)
        facts = file_system.info(path)
        with file_system.open(path, "rb") as stream:
            stream.seek(start)
            version = str(facts.get("ETag") or facts.get("mtime") or facts.get("LastModified") or "")
            yield _Answer(stream, start, facts["size"], version or None, is_page=False)
    except (FileNotFoundError, IsADirectoryError, PermissionError, ImportError, ValueError) as error:
        raise UserError(
            f"{origin.shown} cannot be fetched", found=type(error).__name__, expected="the published file",
            remedy="correct the address, or install what fsspec needs for it (s3fs, gcsfs, ...)",
        ) from None  # fmt: skip


def _page(origin: Origin) -> UserError:
    return UserError(
        f"{origin.shown} is a web page", found="HTML in place of the file", expected="the published file",
        remedy="it may want a login or a confirmation: fetch it with a browser and put it there, or give another url",
    )  # fmt: skip


def _words(error: Exception) -> str:
    """What happened, without the address: it may be signed."""
    if isinstance(error, Broken):
        return str(error)
    reason = getattr(error, "reason", None) or (error.strerror if isinstance(error, OSError) else None)
    return f"{type(error).__name__}{f': {reason}' if reason else ''}"


def _bar(title: str, total: int | None, done: int) -> Any:
    return tqdm(desc=title, total=total, initial=done, unit="B", unit_scale=True, delay=2, mininterval=0.5)
