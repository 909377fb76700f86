"""Archives, unpacked without trust: no way out of the folder, no links, no bombs, each file whole or not there."""

from __future__ import annotations

import contextlib
import fnmatch
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from tqdm import tqdm

from anchorformer.errors import UserError
from data.annotations import RecordError, image_path
from data.arrow import written_whole
from data.disk import cannot_write, size
from data.prepare.config import FileConfig

GB = 1_000_000_000
MOST_MEMBERS = 5_000_000
"""Members of one archive; more are no data set of images."""

CHUNK = 1 << 20

DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError,
)  # fmt: skip
"""What the archive modules raise on broken files; the last one is a compression that they do not know."""


@dataclass(frozen=True)
class Unpacked:
    """What is in place now."""

    files: int
    bytes: int


@dataclass(frozen=True)
class Member:
    """One file of an archive; its name is checked."""

    name: str
    size: int


class Archive(Protocol):
    """A zip or a tar file that is open."""

    def members(self) -> Iterator[tuple[Member, IO[bytes]]]:
        """Its files, each with its content while it is that one's turn."""
        ...


def unpack(archive: Path, folder: Path, config: FileConfig) -> Unpacked:
    """Puts the wanted members below `folder`; those that are there in their size are left alone.

    Raises:
        UserError: a name that leads out, a link or another member that is no file, more bytes than twice
            `unpacked_gb`, a damaged archive, none of the wanted members, or a disk without room.
    """
    limit = int(2 * config.unpacked_gb * GB)
    files = written = 0
    try:
        with (
            _opened(archive) as opened,
            tqdm(desc=f"unpacking {archive.name}", unit="B", unit_scale=True, delay=2, mininterval=0.5) as progress,
        ):
            for number, (member, stream) in enumerate(opened.members()):
                name = _checked(member.name, archive)
                if number >= MOST_MEMBERS:
                    raise _bomb(archive, f"more than {MOST_MEMBERS} files", "fewer files")
                if config.only and not any(fnmatch.fnmatchcase(name, pattern) for pattern in config.only):
                    continue
                if written + member.size > limit:
                    raise _bomb(archive, f"more than {size(limit)}", f"about {size(config.unpacked_gb * GB)}")
                target = folder / (PurePosixPath(name).name if config.flat else name)
                _write(stream, member, target)
                files, written = files + 1, written + member.size
                progress.update(member.size)
    except DAMAGE as error:
        raise UserError(
            f"{archive} is damaged", found=f"{type(error).__name__}: {error}", expected="a complete archive",
            remedy="remove it, and fetch it again",
        ) from None  # fmt: skip
    except OSError as error:
        raise cannot_write(folder, error, "call the command again: it goes on") from None
    if not files:
        raise UserError(
            f"{archive} holds none of the wanted files", found="other names",
            expected=" or ".join(config.only) or "files",
            remedy="the publisher may have packed it otherwise: correct `only` in conf/prepare",
        )  # fmt: skip
    return Unpacked(files, written)


def _write(stream: IO[bytes], member: Member, target: Path) -> None:
    if target.is_file() and target.stat().st_size == member.size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.size
    with written_whole(target) as draft, draft.open("wb") as file:
        # Never more than was announced and counted, whatever the archive goes on to give.
        while left and (chunk := stream.read(min(CHUNK, left))):
            file.write(chunk)
            left -= len(chunk)
        if left or stream.read(1):
            raise zipfile.BadZipFile(f"{member.name} is not of the size that the archive states")


def _checked(name: str, archive: Path) -> str:
    parts = PurePosixPath(name).parts
    try:
        if "\\" in name or any(":" in part for part in parts[:1]):
            raise RecordError(f"{name!r} is a path of another system")
        return image_path(name)
    except RecordError:
        raise UserError(
            f"{archive} wants to write outside its folder", found=name, expected="paths inside of it",
            remedy="do not trust it: fetch it again from its publisher",
        ) from None  # fmt: skip


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Archive]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            yield _Zip(file, path)
    else:
        with tarfile.open(path, "r:*") as tar:
            yield _Tar(tar, path)


@dataclass(frozen=True)
class _Zip:
    file: zipfile.ZipFile
    path: Path

    def members(self) -> Iterator[tuple[Member, IO[bytes]]]:
        for info in self.file.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir():
                continue
            if kind not in (0, stat.S_IFREG) or info.flag_bits & 1:
                raise _no_file(self.path, info.filename, "encrypted" if info.flag_bits & 1 else "a link or device")
            with self.file.open(info) as stream:
                yield Member(info.filename, info.file_size), stream


@dataclass(frozen=True)
class _Tar:
    file: tarfile.TarFile
    path: Path

    def members(self) -> Iterator[tuple[Member, IO[bytes]]]:
        for info in self.file:
            if info.isdir():
                continue
            stream = self.file.extractfile(info) if info.isreg() else None
            if stream is None:
                raise _no_file(self.path, info.name, "a link or device")
            yield Member(info.name, info.size), stream


def _no_file(archive: Path, name: str, found: str) -> UserError:
    return UserError(
        f"{archive} holds what is no plain file", found=f"{name}: {found}", expected="files and folders",
        remedy="do not trust it: fetch it again from its publisher, or unpack it by hand",
    )  # fmt: skip


def _bomb(archive: Path, found: str, expected: str) -> UserError:
    return UserError(
        f"{archive} becomes too large", found=found, expected=expected,
        remedy="where that is right, raise prepare.files.<file>.unpacked_gb",
    )  # fmt: skip
