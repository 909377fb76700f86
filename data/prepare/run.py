"""A published data set and what it needs, step by step: said, fetched, unpacked, verified; each step once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from anchorformer.errors import UserError
from data.arrow import locked, written_whole
from data.disk import free_bytes, size
from data.prepare.config import DatasetConfig, FileConfig, PrepareConfig, with_needs
from data.prepare.fetch import fetch, hash_of
from data.prepare.origin import file_name, origin, shown
from data.prepare.unpack import GB, unpack
from data.prepare.verify import check_layout, holds

WORK = ".prepare"
"""Folder below the root for what is not complete, archives, and what has been fetched."""


BY_HAND = "by hand"


def prepare(name: str, config: PrepareConfig, ask: Callable[[str], str] = input) -> bool:
    """Brings one data set, and those that it needs, below `config.root`; returns whether it is there now.

    What an earlier call has done is not done again, and what is there without one is recognised.

    Raises:
        UserError: too little room, what fetching, unpacking or verifying raises, or files that only a person can fetch.
    """
    root = Path(config.root)
    wanted = list(with_needs(name, config.prepare))
    todo = {
        part: [file for file in data.files if not _is_there(part, file, data.files[file], root)]
        for part, data in wanted
    }
    if any(todo.values()) and _opens(config.prepare, root, Path(config.cache_dir)):
        todo = {part: [] for part in todo}  # somebody else has put everything there
    print("\n".join(_plan(wanted, todo, config)))
    if config.dry_run:
        return False
    _check_room(_room(wanted, todo, root), root)
    has_to_ask = any(todo.values()) and not config.yes and sys.stdin.isatty()
    if has_to_ask and ask("go on? [y/N] ").strip().lower() not in ("y", "yes"):
        print("nothing was done")
        return False
    (root / WORK).mkdir(parents=True, exist_ok=True)
    by_hand = []
    with locked(root / WORK / "prepare"):
        for part, data in wanted:
            for file in todo[part]:
                if _is_there(part, file, data.files[file], root):
                    continue  # another call has brought it while this one waited
                item = data.files[file]
                if _is_manual(item, config.mirror) and not (item.unpack and _archive(root, part, item).is_file()):
                    place = _archive(root, part, item) if item.unpack else root / item.to
                    by_hand.append(f"{place}: {item.manual}")
                else:
                    _bring(part, file, item, config, root)
    if by_hand:
        raise UserError(
            f"{len(by_hand)} file(s) have to be fetched by hand", found="; ".join(by_hand),
            expected=f"below {root}", remedy="do so, then call the command again: it verifies what you have put there",
        )  # fmt: skip
    for part, data in wanted:
        _note_the_rest(part, data, root)
        for line in check_layout(data, root, Path(config.cache_dir)):
            print(f"{part}: {line}")
    print(_how_to_read(config))
    return True


def _opens(data: DatasetConfig, root: Path, cache_dir: Path) -> bool:
    """Whether all that reads the data set finds everything it needs."""
    try:
        return len(list(check_layout(data, root, cache_dir))) > 0
    except UserError:
        return False


def _plan(wanted: list[tuple[str, DatasetConfig]], todo: Mapping[str, list[str]], config: PrepareConfig) -> list[str]:
    lines = []
    for part, data in wanted:
        lines += [f"{part}: {data.title} ({data.page})", f"  licence: {data.licence}"]
        for file, item in data.files.items():
            place = shown(item, part, None if _is_manual(item, config.mirror) else config.mirror)
            state = size(item.gb * GB) if file in todo[part] else "is there"
            lines.append(f"  {state:>9}  {place} -> {item.to}")
    root = Path(config.root)
    total = sum(data.files[file].gb for part, data in wanted for file in todo[part]) * GB
    room = f"room needed: {size(_room(wanted, todo, root))}, free at {root}: {size(free_bytes(root))}"
    return [*lines, f"to fetch: {size(total)}; {room}"]


def _room(wanted: list[tuple[str, DatasetConfig]], todo: Mapping[str, list[str]], root: Path) -> float:
    """Bytes that are still to be written; an archive and what was in it are there at the same time."""
    room = 0.0
    for part, data in wanted:
        for file in todo[part]:
            item = data.files[file]
            if not (item.unpack and file in _notes(root, part)):  # noted: it has come, and its unpacking has begun
                parts = root / WORK / part / f"{file_name(item) if item.unpack else Path(item.to).name}.part"
                there = parts.stat().st_size if parts.is_file() else 0
                room += max(0.0, item.gb * GB - there) + item.unpacked_gb * GB
    return room


def _check_room(room: float, root: Path) -> None:
    if free_bytes(root) < room:
        raise UserError(
            f"there is too little room at {root}", found=f"{size(free_bytes(root))} free",
            expected=f"{size(room)}, archives and their contents", remedy="free disk space, or name another root=",
        )  # fmt: skip


def _is_manual(item: FileConfig, mirror: str | None) -> bool:
    return item.url is None and item.hub is None and (mirror is None or item.file is None)


def _is_there(part: str, file: str, item: FileConfig, root: Path) -> bool:
    """Whether nothing is left to do for a file: noted by an earlier call, or recognised where it lies.

    Raises:
        UserError: a file has another size or checksum than when it was fetched.
    """
    note = _notes(root, part).get(file)
    target = root / item.to
    if item.unpack:
        if note is not None and "unpacked" in note:
            return True
        return bool(item.holds) and holds(item.holds, root) is None
    if note is None or not target.exists():
        return target.exists()
    found = {"bytes": target.stat().st_size, "sha256": hash_of(target)} if target.is_file() else {}
    if any(note[key] != value for key, value in found.items()):
        raise UserError(
            f"{target} is not the file that was fetched", found=f"{found['bytes']} bytes, sha256 {found['sha256']}",
            expected=f"{note['bytes']} bytes, sha256 {note['sha256']}",
            remedy=f"remove it to have it fetched again; or, where it is right, the entry in {_note_path(root, part)}",
        )  # fmt: skip
    return True


def _bring(part: str, file: str, item: FileConfig, config: PrepareConfig, root: Path) -> None:
    """Fetches one file, unpacks it where that is wanted, and notes what came."""
    archive = _archive(root, part, item)
    before = _notes(root, part).get(file, {})
    if _is_manual(item, config.mirror):
        before = {"from": BY_HAND, "bytes": archive.stat().st_size, "sha256": hash_of(archive)}
    elif not (item.unpack and archive.is_file() and before.get("bytes") == archive.stat().st_size):
        source = origin(item, part, config.mirror)
        if before:
            source = replace(source, sha256=before["sha256"], stated_in=str(_note_path(root, part)))
        fetched = fetch(source, archive if item.unpack else root / item.to, archive.parent)
        before = {"from": source.shown, "bytes": fetched.bytes, "sha256": fetched.sha256}
        _note(root, part, file, before)
    if item.unpack:
        unpacked = unpack(archive, root / item.to, item)
        wrong = holds(item.holds, root)
        if wrong is not None:
            raise UserError(
                f"{archive} is not the published archive", found=wrong, expected="all of them",
                remedy="remove it, and fetch it again",
            )  # fmt: skip
        _note(root, part, file, {**before, "unpacked": {"files": unpacked.files, "bytes": unpacked.bytes}})
        if not config.keep_archives and before["from"] != BY_HAND:
            archive.unlink()


def _archive(root: Path, part: str, item: FileConfig) -> Path:
    return root / WORK / part / file_name(item)


def _note_the_rest(part: str, data: DatasetConfig, root: Path) -> None:
    """Files that somebody else has put there are known from now on as well."""
    for file, item in data.files.items():
        target = root / item.to
        if not item.unpack and target.is_file() and file not in _notes(root, part):
            facts = {"from": BY_HAND, "bytes": target.stat().st_size, "sha256": hash_of(target)}
            _note(root, part, file, facts)


def _note_path(root: Path, part: str) -> Path:
    return root / WORK / f"{part}.json"


def _notes(root: Path, part: str) -> dict[str, Any]:
    path = _note_path(root, part)
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _note(root: Path, part: str, file: str, facts: Mapping[str, Any]) -> None:
    notes = {**_notes(root, part), file: facts}
    with written_whole(_note_path(root, part)) as draft:
        draft.write_text(json.dumps(notes, indent=1) + "\n")


def _how_to_read(config: PrepareConfig) -> str:
    data = config.prepare
    uses = [f"data={data.data}"] if data.data else []
    uses += [f"task={task}" for task in data.tasks]
    return f"ready below {config.root}" + (f": {', '.join(uses)}, with data.root={config.root}" if uses else "")
