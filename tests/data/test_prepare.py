"""Fetching published data sets from a local server that fails in every way that real ones do."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from PIL import Image

from anchorformer.errors import UserError
from anchorformer.schema import parse, parse_plugin
from data import disk
from data.__main__ import main
from data.overrides import CONF, options
from data.prepare import fetch as fetching
from data.prepare import run, unpack
from data.prepare.config import FileConfig, PrepareConfig, catalogue, named, with_needs
from data.prepare.fetch import fetch
from data.prepare.origin import Origin, origin, plain
from data.prepare.run import prepare
from data.sources.base import PACKAGE, SourceConfig
from tests.data.servers import Server, serving


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(fetching, "CHUNK", 1000)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "published").mkdir()
    with serving(tmp_path / "published") as running:
        yield running


def _png(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (9, 8), (shade, 0, 0)).save(content, "PNG")
    return content.getvalue()


def _zip(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


NOISE = os.urandom(20_000)
"""What is fetched where it does not matter what."""


def _origin(server: Server, name: str = "x.bin", **values: Any) -> Origin:
    return Origin(f"{server.url}/{name}", f"publisher/{name}", **values)


def _fetched(server: Server, tmp_path: Path, content: bytes = NOISE, **values: Any) -> Path:
    (tmp_path / "published/x.bin").write_bytes(content)
    target = tmp_path / "root/x.bin"
    found = fetch(_origin(server, **values), target, tmp_path / "work")
    assert found.sha256 == hashlib.sha256(target.read_bytes()).hexdigest()
    assert found.bytes == len(content)
    return target


def _ranges(server: Server) -> list[str | None]:
    return [span for method, _, span in server.asked if method == "GET"]


def test_a_connection_that_is_cut_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.headers["x.bin"] = {"ETag": '"one"'}
    cuts = [3000, 1, 5000]

    def cut(handler: Any, content: bytes, start: int) -> bool:
        if not cuts:
            return False
        handler.cut(content, start, cuts.pop(0))
        return True

    server.faults.append(cut)
    server.cut_headers = server.headers["x.bin"]
    assert _fetched(server, tmp_path).read_bytes() == NOISE
    assert _ranges(server) == [None, "bytes=3000-", "bytes=3001-", "bytes=8001-"]
    assert not list((tmp_path / "work").iterdir()), "nothing of the work is left"


def test_a_call_after_a_kill_goes_on(server: Server, tmp_path: Path) -> None:
    server.cut_headers = server.headers["x.bin"] = {"ETag": '"one"'}
    server.faults.append(lambda handler, content, start: not handler.cut(content, start, 4000 if not start else 0))
    with pytest.raises(UserError, match="cannot be fetched") as caught:
        _fetched(server, tmp_path)
    assert "4000 bytes are there" in caught.value.found
    assert "it goes on" in caught.value.remedy
    assert not (tmp_path / "root/x.bin").exists()
    server.faults.clear()
    server.asked.clear()
    assert _fetched(server, tmp_path).read_bytes() == NOISE
    assert _ranges(server) == ["bytes=4000-"]


def test_a_file_that_has_changed_meanwhile_begins_anew(server: Server, tmp_path: Path) -> None:
    server.cut_headers = server.headers["x.bin"] = {"ETag": '"one"'}
    server.faults.append(lambda handler, content, start: not handler.cut(content, start, 4000 if not start else 0))
    with pytest.raises(UserError, match="cannot be fetched"):
        _fetched(server, tmp_path)
    server.faults.clear()
    server.headers["x.bin"] = {"ETag": '"two"'}
    other = NOISE[::-1]
    assert _fetched(server, tmp_path, other).read_bytes() == other


def test_a_server_without_ranges_or_versions(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    cuts = [4000]
    server.faults.append(lambda handler, content, start: bool(cuts) and not handler.cut(content, start, cuts.pop()))
    assert _fetched(server, tmp_path).read_bytes() == NOISE
    assert _ranges(server) == [None, None]


def test_a_known_checksum_needs_no_version(server: Server, tmp_path: Path) -> None:
    cuts = [4000]
    server.faults.append(lambda handler, content, start: bool(cuts) and not handler.cut(content, start, cuts.pop()))
    assert _fetched(server, tmp_path, sha256=hashlib.sha256(NOISE).hexdigest()).read_bytes() == NOISE
    assert _ranges(server) == [None, "bytes=4000-"]


def test_what_was_complete_when_it_was_killed(server: Server, tmp_path: Path) -> None:
    server.headers["x.bin"] = {"ETag": '"one"'}
    (tmp_path / "work").mkdir()
    (tmp_path / "work/x.bin.part").write_bytes(NOISE)
    (tmp_path / "work/x.bin.part.json").write_text(json.dumps({"version": '"one"'}))
    assert _fetched(server, tmp_path).read_bytes() == NOISE
    assert _ranges(server) == [f"bytes={len(NOISE)}-"]


def test_what_is_there_is_longer_than_the_file(server: Server, tmp_path: Path) -> None:
    server.headers["x.bin"] = {"ETag": '"one"'}
    (tmp_path / "work").mkdir()
    (tmp_path / "work/x.bin.part").write_bytes(NOISE + b"more")
    (tmp_path / "work/x.bin.part.json").write_text(json.dumps({"version": '"one"'}))
    assert _fetched(server, tmp_path).read_bytes() == NOISE


def test_another_checksum_or_size(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another checksum") as caught:
        _fetched(server, tmp_path, sha256="0" * 64)
    assert hashlib.sha256(NOISE).hexdigest() in caught.value.found
    assert not (tmp_path / "root/x.bin").exists()
    assert not list((tmp_path / "work").glob("*.part")), "the wrong file is not gone on with"
    with pytest.raises(UserError, match="cannot be fetched") as caught:
        _fetched(server, tmp_path, size=3)
    assert "in place of 3" in caught.value.found


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (401, 1), (500, 3), (503, 3)])
def test_a_server_that_refuses(server: Server, tmp_path: Path, status: int, tries: int) -> None:
    server.faults.append(lambda handler, *_: not handler.say(status))
    with pytest.raises(UserError, match=r"publisher/x\.bin cannot be fetched") as caught:
        _fetched(server, tmp_path)
    assert str(status) in caught.value.found
    assert len(server.asked) == tries


@pytest.mark.parametrize("told", [True, False])
def test_a_login_page_in_place_of_the_file(server: Server, tmp_path: Path, told: bool) -> None:
    page = b"\n<!DOCTYPE html><html>please log in</html>"
    kind = {"Content_Type": "text/html; charset=utf-8"} if told else {}
    server.faults.append(lambda handler, *_: not handler.say(200, page, **kind))
    with pytest.raises(UserError, match="is a web page") as caught:
        _fetched(server, tmp_path)
    assert "login" in caught.value.remedy
    assert not (tmp_path / "root/x.bin").exists()


def test_a_full_disk_and_then_room(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.headers["x.bin"] = {"ETag": '"one"'}
    plain_write = fetching.write

    def full(file: Any, chunk: bytes) -> None:
        if file.tell() >= 5000:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain_write(file, chunk)

    monkeypatch.setattr(fetching, "write", full)
    with pytest.raises(UserError, match="cannot be written") as caught:
        _fetched(server, tmp_path)
    assert "No space left" in caught.value.found
    monkeypatch.setattr(fetching, "write", plain_write)
    assert _fetched(server, tmp_path).read_bytes() == NOISE
    assert _ranges(server) == [None, "bytes=5000-"]


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be fetched") as caught:
        fetch(Origin("http://127.0.0.1:9/x?key=secret", "publisher/x"), tmp_path / "x", tmp_path / "work")
    assert "secret" not in str(caught.value)


def test_a_key_is_not_sent_to_where_the_hub_sends_us(server: Server, tmp_path: Path) -> None:
    (tmp_path / "published/real.bin").write_bytes(NOISE)
    seen = []

    def moved(handler: Any, *_: Any) -> bool:
        seen.append((handler.path, handler.headers.get("Authorization")))
        return handler.path == "/x.bin" and not handler.say(302, Location=f"{server.url}/real.bin")

    server.faults.append(moved)
    _fetched(server, tmp_path, headers={"Authorization": "Bearer secret"})
    assert seen == [("/x.bin", "Bearer secret"), ("/real.bin", None)]


def test_names_with_spaces_and_users(server: Server, tmp_path: Path) -> None:
    (tmp_path / "published/a b%.bin").write_bytes(NOISE)
    seen = []
    server.faults.append(lambda handler, *_: seen.append(handler.headers.get("Authorization")))
    url = server.url.replace("//", "//me:sec%40ret@") + "/a b%25.bin"
    fetch(Origin(url, plain(url)), tmp_path / "x", tmp_path / "work")
    assert (tmp_path / "x").read_bytes() == NOISE
    assert seen == ["Basic bWU6c2VjQHJldA=="]
    with pytest.raises(UserError) as caught:
        fetch(Origin("http://me:secret@127.0.0.1:port/x", "publisher/x"), tmp_path / "y", tmp_path / "work")
    assert "secret" not in str(caught.value)


def test_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "copy.bin").write_bytes(NOISE)
    fetch(Origin(str(tmp_path / "copy.bin"), "copy"), tmp_path / "x", tmp_path / "work")
    assert (tmp_path / "x").read_bytes() == NOISE
    with pytest.raises(UserError, match="gone cannot be fetched"):
        fetch(Origin(str(tmp_path / "gone.bin"), "gone"), tmp_path / "y", tmp_path / "work")


def test_urls_are_shown_without_keys() -> None:
    assert plain("https://me:secret@host:80/a/b.zip?token=secret#x") == "https://host:80/a/b.zip"
    assert plain("/a/b?c") == "/a/b?c"
    assert "secret" not in repr(Origin("https://host/?secret", "shown", {"Authorization": "secret"}))


HUB = FileConfig(to="x.bin", gb=0, hub="someone/set", file="x.bin")


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A hub that holds one file."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    return server


def test_the_hub_states_size_and_checksum(hub: Server, tmp_path: Path) -> None:
    name = "datasets/someone/set/resolve/main/x.bin"
    path = tmp_path / "published" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(NOISE)
    sha256 = hashlib.sha256(NOISE).hexdigest()
    hub.headers[name] = {"X-Repo-Commit": "c" * 40, "ETag": '"pointer"', "X-Linked-Etag": f'"{sha256}"',
                         "X-Linked-Size": str(len(NOISE))}  # fmt: skip
    found = origin(HUB, "set", None)
    assert (found.size, found.sha256, found.shown) == (len(NOISE), sha256, "hf://datasets/someone/set/x.bin")
    fetch(found, tmp_path / "x.bin", tmp_path / "work")
    hub.headers[name]["X-Linked-Etag"] = f'"{"0" * 64}"'
    with pytest.raises(UserError, match=r"hf://datasets/someone/set/x\.bin came with another checksum"):
        fetch(origin(HUB, "set", None), tmp_path / "x.bin", tmp_path / "work")
    hub.headers[name] = {"X-Repo-Commit": "c" * 40, "ETag": '"small"'}
    assert origin(HUB, "set", None).sha256 is None, "of a small file the ETag is no sha256"


@pytest.mark.parametrize(("status", "code", "found", "remedy"), [
    (403, "GatedRepo", "gated", "agree to its terms"),
    (401, "RepoNotFound", "RepositoryNotFound", "hf auth login"),
    (404, "EntryNotFound", "EntryNotFound", "look at"),
    (500, "", "HTTPError", "mirror="),
])  # fmt: skip
def test_the_hub_refuses(
    hub: Server, monkeypatch: pytest.MonkeyPatch, status: int, code: str, found: str, remedy: str
) -> None:
    from tests.data.servers import Handler

    monkeypatch.setattr(Handler, "do_HEAD", lambda handler: handler.say(status, X_Error_Code=code))
    with pytest.raises(UserError, match=r"hf://datasets/someone/set/x\.bin cannot be fetched") as caught:
        origin(HUB, "set", None)
    assert found in caught.value.found
    assert remedy in caught.value.remedy


def test_no_hub_in_reach(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(UserError, match="cannot be fetched") as caught:
        origin(HUB, "set", None)
    assert "HF_ENDPOINT" in caught.value.remedy


ARCHIVE = FileConfig(to="in", gb=0, url="u", unpack=True, unpacked_gb=1e-5)
"""20,000 bytes at most."""


def _unpacked(tmp_path: Path, members: dict[str, bytes], config: FileConfig = ARCHIVE) -> dict[str, bytes]:
    _zip(tmp_path / "a.zip", members)
    unpack.unpack(tmp_path / "a.zip", tmp_path / "in", config)
    return _tree(tmp_path / "in")


def _tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_members_are_chosen_and_laid_flat(tmp_path: Path) -> None:
    members = {"top/a.json": b"1", "top/b.json": b"2", "__MACOSX/top/._a.json": b"3", "c.png": b"4"}
    only = replace(ARCHIVE, only=("top/*.json",))
    assert _unpacked(tmp_path, members, only) == {"top/a.json": b"1", "top/b.json": b"2"}
    (tmp_path / "in/top/a.json").unlink()
    assert _unpacked(tmp_path, members, replace(only, flat=True))["a.json"] == b"1"
    with pytest.raises(UserError, match="none of the wanted files"):
        _unpacked(tmp_path, members, replace(ARCHIVE, only=("*.txt",)))


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "..\\x", "C:\\x", "a\0b/../../x"])
def test_no_member_leaves_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="wants to write outside"):
        _unpacked(tmp_path, {"fine": b"1", name.replace("\0", "/../.."): b"2"})
    assert not (tmp_path / "x").exists()


def test_no_links_and_no_devices(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="no plain file"):
        unpack.unpack(tmp_path / "a.zip", tmp_path / "in", ARCHIVE)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo("link")
        info.type, info.linkname = kind, "/etc/passwd"
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.addfile(info)
        with pytest.raises(UserError, match="no plain file"):
            unpack.unpack(tmp_path / "a.tar", tmp_path / "in", ARCHIVE)
    assert not (tmp_path / "in").exists()


def test_a_tar_and_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name, size in (("d/a", 10), ("d/b", 20)):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(b"x" * size))
    found = unpack.unpack(tmp_path / "a.tar.gz", tmp_path / "in", ARCHIVE)
    assert (found.files, found.bytes, set(_tree(tmp_path / "in"))) == (2, 30, {"d/a", "d/b"})
    with pytest.raises(UserError, match="becomes too large"):
        _unpacked(tmp_path, {"zeros": bytes(20_001)})
    assert "zeros" not in _tree(tmp_path / "in")
    monkeypatch.setattr(unpack, "MOST_MEMBERS", 2)
    with pytest.raises(UserError, match="becomes too large"):
        _unpacked(tmp_path, {"1": b"", "2": b"", "3": b""})


@pytest.mark.parametrize("keep", [10, 150, 260])
def test_a_damaged_archive(tmp_path: Path, keep: int) -> None:
    _zip(tmp_path / "a.zip", {"a": os.urandom(100), "b": os.urandom(100)})
    content = bytearray((tmp_path / "a.zip").read_bytes())
    if keep == 150:
        content[60] ^= 1  # inside the first member
    else:
        content = content[:keep]
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        unpack.unpack(tmp_path / "a.zip", tmp_path / "in", ARCHIVE)
    assert _tree(tmp_path / "in") == {} if (tmp_path / "in").exists() else True


def test_unpacking_goes_on_after_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {f"{number}": os.urandom(50) for number in range(5)}
    plain_write = unpack._write

    def full(stream: Any, member: Any, target: Path) -> None:
        if member.name == "3":
            raise OSError(errno.ENOSPC, "No space left on device")
        plain_write(stream, member, target)

    monkeypatch.setattr(unpack, "_write", full)
    with pytest.raises(UserError, match="cannot be written"):
        _unpacked(tmp_path, members)
    assert set(_tree(tmp_path / "in")) == {"0", "1", "2"}
    monkeypatch.setattr(unpack, "_write", plain_write)
    before = (tmp_path / "in/1").stat().st_mtime_ns
    assert _unpacked(tmp_path, members) == members
    assert (tmp_path / "in/1").stat().st_mtime_ns == before


TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]


@pytest.fixture
def publish(server: Server, tmp_path: Path) -> Callable[..., PrepareConfig]:
    """LLaVA-558k with three records, on a mirror."""

    def config(**values: Any) -> PrepareConfig:
        folder = tmp_path / "published/llava_558k"
        records = [{"id": str(n), "image": f"0000{n}/{n}.jpg", "conversations": TURNS} for n in range(3)]
        _zip(folder / "images.zip", {record["image"]: _png(n) for n, record in enumerate(records)})
        (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(records))
        data = replace(named("llava_558k"), records={"llava_558k": 3})
        data = replace(data, files={name: replace(file, gb=0.0, unpacked_gb=1e-3 if file.unpack else 0.0)
                                    for name, file in data.files.items()})  # fmt: skip
        given = {"root": str(tmp_path / "root"), "mirror": server.url, "cache_dir": str(tmp_path / "cache"), **values}
        return PrepareConfig(prepare=data, **given)

    return config


def test_from_nothing_to_data_that_opens(
    publish: Callable[..., PrepareConfig], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = publish()
    assert prepare("llava_558k", config)
    shown = capsys.readouterr().out
    assert "licence: " in shown
    assert f"{server.url}/llava_558k/images.zip -> LLaVA-Pretrain/images" in shown
    assert "free at" in shown
    assert "llava_558k: 3 records, 3 images" in shown
    assert f"data=llava_558k, with data.root={config.root}" in shown
    assert list((tmp_path / "cache").glob("llava_558k-*.arrow")), "the index that a run will read"
    notes = json.loads((tmp_path / "root/.prepare/llava_558k.json").read_text())
    content = (tmp_path / "published/llava_558k/images.zip").read_bytes()
    assert notes["images"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert notes["images"]["unpacked"] == {"files": 3, "bytes": sum(len(_png(n)) for n in range(3))}
    assert not list((tmp_path / "root/.prepare").rglob("*.zip")), "the archive is not kept"
    server.asked.clear()
    assert prepare("llava_558k", config)
    assert not server.asked, "a second call fetches nothing"
    assert "is there" in capsys.readouterr().out
    (tmp_path / "root/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json").write_text("[]")
    with pytest.raises(UserError, match="not the file that was fetched"):
        prepare("llava_558k", config)


def test_nothing_is_done_in_a_dry_run(
    publish: Callable[..., PrepareConfig], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not prepare("llava_558k", publish(dry_run=True))
    assert "to fetch" in capsys.readouterr().out
    assert not server.asked
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("answer", "yes", "tty", "done"),
    [("y", False, True, True), ("", False, True, False), ("n", True, True, True), ("n", False, False, True)],
)
def test_a_terminal_is_asked_and_a_script_is_not(
    publish: Callable[..., PrepareConfig],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    yes: bool,
    tty: bool,
    done: bool,
) -> None:
    monkeypatch.setattr(run.sys.stdin, "isatty", lambda: tty)
    asked: list[str] = []
    assert prepare("llava_558k", publish(yes=yes), lambda text: asked.append(text) or answer) is done
    assert bool(asked) is (tty and not yes)


def test_a_kill_while_unpacking(
    publish: Callable[..., PrepareConfig], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_write = unpack._write

    def killed(stream: Any, member: Any, target: Path) -> None:
        if target.name == "1.jpg":
            raise KeyboardInterrupt
        plain_write(stream, member, target)

    monkeypatch.setattr(unpack, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare("llava_558k", publish())
    monkeypatch.setattr(unpack, "_write", plain_write)
    server.asked.clear()
    assert prepare("llava_558k", publish())
    assert not [name for method, name, _ in server.asked if method == "GET"], "what was fetched is not fetched again"


def test_what_comes_another_time_is_compared(publish: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    config = publish()
    prepare("llava_558k", config)
    annotations = tmp_path / "root/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
    annotations.unlink()
    published = tmp_path / "published/llava_558k" / annotations.name
    published.write_text(published.read_text() + " ")
    with pytest.raises(UserError, match="another checksum") as caught:
        prepare("llava_558k", config)
    assert "llava_558k.json has the checksum of before" in caught.value.remedy


def test_missing_files_and_other_counts(publish: Callable[..., PrepareConfig], tmp_path: Path) -> None:
    config = publish()
    _zip(tmp_path / "published/llava_558k/images.zip", {"00000/0.jpg": _png(0)})
    with pytest.raises(UserError, match="2 of 3 images of llava_558k are not there") as caught:
        prepare("llava_558k", config)
    assert "00001/1.jpg" in caught.value.found
    other = replace(config, prepare=replace(config.prepare, records={"llava_558k": 4}))
    with pytest.raises(UserError, match="another number of records") as caught:
        prepare("llava_558k", other)
    assert (caught.value.found, caught.value.expected) == ("3", "4")
    (tmp_path / "published/llava_558k/blip_laion_cc_sbu_558k.json").unlink()
    with pytest.raises(UserError, match="cannot be fetched"):
        prepare("llava_558k", replace(config, root=str(tmp_path / "second")))


def test_too_little_room_is_said_before_anything_is_fetched(
    publish: Callable[..., PrepareConfig], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = publish()
    monkeypatch.setattr(run, "free_bytes", lambda _: 10)
    with pytest.raises(UserError, match="too little room"):
        prepare("llava_558k", config)
    assert not server.asked


def test_room_that_is_taken_already_is_not_asked_for_again(
    publish: Callable[..., PrepareConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that had room for an archive and its contents goes on when the one of them has come."""
    config = publish()
    rooms: list[float] = []
    monkeypatch.setattr(run, "_check_room", lambda room, root: rooms.append(room))
    monkeypatch.setattr(run, "unpack", lambda *_: pytest.fail("killed here"))
    with pytest.raises(pytest.fail.Exception):
        prepare("llava_558k", config)
    monkeypatch.setattr(run, "unpack", unpack.unpack)
    prepare("llava_558k", config)
    assert rooms == [pytest.approx(1e6), 0.0]


def test_files_that_are_there_already(publish: Callable[..., PrepareConfig], server: Server, tmp_path: Path) -> None:
    config = publish()
    unpack.unpack(tmp_path / "published/llava_558k/images.zip", tmp_path / "root/LLaVA-Pretrain/images",
                  config.prepare.files["images"])  # fmt: skip
    name = "blip_laion_cc_sbu_558k.json"
    (tmp_path / "root/LLaVA-Pretrain" / name).write_bytes((tmp_path / "published/llava_558k" / name).read_bytes())
    assert prepare("llava_558k", config)
    assert not server.asked
    assert json.loads((tmp_path / "root/.prepare/llava_558k.json").read_text())["annotations"]["from"] == "by hand"


def test_what_only_a_person_can_fetch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = {f"p{n}.png": _png(n) for n in range(2)}
    entries = [{"questionId": n, "question": "?", "answers": ["a"], "image": f"documents/p{n}.png"} for n in range(2)]
    data = replace(named("docvqa"), records={"docvqa": 2, "docvqa_val": 2})
    data = replace(
        data, files={name: replace(file, gb=0, unpacked_gb=1e-3, holds={}) for name, file in data.files.items()}
    )
    config = PrepareConfig(prepare=data, root=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="have to be fetched by hand") as caught:
        prepare("docvqa", config)
    archives = tmp_path / ".prepare/docvqa"
    assert f"{archives / 'spdocvqa_qas.zip'}: register at" in caught.value.found
    questions = json.dumps({"data": entries}).encode()
    names = [f"spdocvqa_qas/{split}_v1.0_withQT.json" for split in ("train", "val")]
    _zip(archives / "spdocvqa_qas.zip", dict.fromkeys(names, questions))
    with tarfile.open(archives / "spdocvqa_images.tar.gz", "w:gz") as tar:
        for name, content in pages.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert prepare("docvqa", config)
    shown = capsys.readouterr().out
    assert "docvqa: 2 records, 2 images" in shown
    assert "task=docvqa_val" in shown
    assert (archives / "spdocvqa_qas.zip").is_file(), "what a person has fetched is not thrown away"


def test_the_catalogue_says_what_opens_it() -> None:
    """Every file parses; what it names exists, and is read from where its files go."""
    assert {"llava_558k", "llava_665k", "docvqa", "chartqa", "textvqa"} <= set(catalogue())
    read = set()
    for name in catalogue():
        data = named(name)
        read |= set(data.tasks)
        parts = dict(with_needs(name, data))
        assert list(parts)[-1] == name
        assert data.data is None or data.data in options("data")
        assert set(data.tasks) <= set(options("eval"))
        assert set(data.records) <= {data.data, *data.tasks}
        assert data.files
        assert all(file.gb > 0 for file in data.files.values())
        assert data.page.startswith("https://")
        for file in data.files.values():
            assert file.url is None or file.url.startswith(("https://", "http://images.cocodataset.org/"))
            assert file.hub is None or file.hub.count("/") == 1
    published = {task for task in options("eval") if not task.startswith(("miniworld", "custom"))}
    assert published - read == {"docvqa_test", "textvqa_val_ocr"}, (
        "questions without answers, and prompts of LLaVA's own"
    )


@pytest.mark.parametrize("name", ["llava_558k", "llava_665k", "textvqa", "gqa", "pope", "scienceqa", "mme", "vizwiz"])
def test_places_are_those_that_the_sources_read(name: str) -> None:
    """The folders of the catalogue are those that the sources' own configurations start from."""
    places = {place for _, data in with_needs(name, named(name)) for file in data.files.values()
              for place in (file.to, *file.holds)}  # fmt: skip
    data = named(name)
    specs = [yaml.safe_load((CONF / f"eval/{task}.yaml").read_text())["source"] for task in data.tasks]
    if data.data is not None:
        specs += yaml.safe_load((CONF / f"data/{data.data}.yaml").read_text())["sources"].values()
    for spec in specs:
        config = parse_plugin(SourceConfig, spec, PACKAGE, name)
        for key in ("folder", "annotations"):
            wanted = getattr(config, key, None)
            assert wanted is None or any(
                place == "." or wanted == place or place.startswith(f"{wanted}/") for place in places
            ), (wanted, places)  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), [
    (["prepare"], "prepare what?"),
    (["prepare", "root=x"], "prepare what?"),
    (["prepare", "llava_558", "root=x"], "there is no prepare 'llava_558'"),
    (["prepare", "llava_558k"], "1 value(s) are missing"),
    (["prepare", "llava_558k", "root=x", "mirorr=y"], "unknown key 'mirorr'"),
    (["prepare", "llava_558k", "root=x", "prepare.files.images.gb=big"], "valid number"),
    (["prepare", "llava_558k", "root=x", "prepare.files.images.to=../x"], "leaves the root"),
])  # fmt: skip
def test_mistakes_in_the_command(words: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        main(words)
    assert expected in str(caught.value)


def test_the_command(
    publish: Callable[..., PrepareConfig], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish()
    images = f"prepare.files.images.url={server.url}/llava_558k/images.zip"
    annotations = f"prepare.files.annotations.url={server.url}/llava_558k/blip_laion_cc_sbu_558k.json"
    words = [
        "prepare",
        "llava_558k",
        f"root={tmp_path / 'root'}",
        f"cache_dir={tmp_path / 'cache'}",
        images,
        annotations,
    ]
    small = ["prepare.files.images.gb=0", "prepare.files.images.unpacked_gb=0.01", "prepare.records.llava_558k=3"]
    assert main([*words, *small, "dry_run=true"]) == 0
    assert main([*words, *small, "yes=true"]) == 0
    assert "3 records, 3 images" in capsys.readouterr().out
    assert main(["prepare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("visual_genome", "mirror=null", "shard_mb=512"))


def test_sizes_for_people(tmp_path: Path) -> None:
    assert [disk.size(count) for count in (999, 1000, 27e9, 3e12)] == ["999 bytes", "1.0 kB", "27.0 GB", "3.0 TB"]
    assert disk.free_bytes(tmp_path / "not" / "there") > 0
    with pytest.raises(UserError, match="does not say where it comes from"):
        parse(FileConfig, {"to": "x", "gb": 1}, "x")
    with pytest.raises(UserError, match="how large"):
        parse(FileConfig, {"to": "x", "gb": 1, "url": "u", "unpack": True}, "x")
