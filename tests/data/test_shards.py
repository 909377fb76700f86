"""A sharded copy is the native files: same records, images, order and steps, from a disk and from a URL."""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorformer.errors import UserError
from anchorformer.processing import AnchorFormerProcessor
from data import storage
from data.__main__ import main
from data.config import DataConfig, OnBad
from data.images import locate, size
from data.loader import Loader
from data.mixture import Mixture, open_sources
from data.sampler import Sampler, plan_step
from data.scan import scan
from data.scan_config import ScanConfig
from data.shards import shard as shard_file
from data.shards import write as writing
from data.shards.config import ShardConfig
from data.shards.layout import MANIFEST
from data.storage import Storage
from tests.data.servers import Server, serving
from tests.data.test_loader import _equal, _Run, _Stage


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WAITS", (0.0, 0.0))


def _shard(config: DataConfig, out: Path, **values: Any) -> Any:
    return writing.write(ShardConfig(data=config, out=str(out), **values))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images make a shard, one a batch."""
    monkeypatch.setattr(writing, "MB", 170)
    monkeypatch.setattr(shard_file, "BATCH_BYTES", 90)


@pytest.fixture
def copied(filled: Any, tmp_path: Path, small: None) -> tuple[DataConfig, Path]:
    """The twelve records with one image shown twice, and their copy in shards of one or two images."""
    filled.add("again", "0.png", "once more?")
    config = filled.config()
    out = tmp_path / "copy"
    _shard(config, out, shard_mb=1)
    return config, out


@pytest.fixture
def served(copied: tuple[DataConfig, Path]) -> Iterator[tuple[DataConfig, Server]]:
    with serving(copied[1]) as server:
        yield copied[0], server


def _read(config: DataConfig, place: object, tmp_path: Path) -> DataConfig:
    """The same sources from their copy; on a machine that has neither the files nor a cache of them."""
    return replace(config, shards=str(place), root="/nowhere", cache_dir=str(tmp_path / "other cache"))


def test_every_record_and_image_is_the_same(copied: tuple[DataConfig, Path], tmp_path: Path) -> None:
    config, out = copied
    ((native, _),), ((sharded, _),) = open_sources(config), open_sources(_read(config, out, tmp_path))
    assert (len(sharded), sharded.fingerprint, sharded.name) == (len(native), native.fingerprint, native.name)
    for index in range(len(native)):
        mine, theirs = native[index], sharded[index]
        assert replace(theirs, images=()) == replace(mine, images=())
        assert sharded.record_id(index) == mine.id
        contents = [Path(locate(ref)).read_bytes() for ref in mine.images]  # type: ignore[arg-type]
        assert [locate(ref) for ref in theirs.images] == contents
        assert [size(ref) for ref in theirs.images] == [size(ref) for ref in mine.images]
        assert all(str(ref.path).startswith("images/") for ref in theirs.images)
    facts = json.loads((out / MANIFEST).read_text())["sources"]["own"]
    assert (facts["num_records"], facts["num_images"], facts["num_missing"]) == (13, 8, 0)
    assert len(facts["shards"]) >= 4
    for number, item in enumerate(facts["shards"]):
        content = (out / f"own/images-{number:05d}.arrow").read_bytes()
        assert (item["bytes"], item["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert pa.ipc.open_file(content).read_all().num_rows == item["images"] <= 2, "any Arrow reader opens a shard"
    assert sorted(path.name for path in out.iterdir()) == ["own", "plan.json", MANIFEST, f"{MANIFEST}.lock"]
    assert not (out / "own/journal.jsonl").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_over_http_are_those_of_the_files(
    served: tuple[DataConfig, Server], processor: AnchorFormerProcessor, tmp_path: Path, workers: int
) -> None:
    config, server = served
    stage = _Stage(global_batch=4, epochs=None, max_steps=7)
    native = Loader(_Run(config, stage), processor, 0, 1)
    whole = list(native)
    remote = replace(_read(config, server.url, tmp_path), num_workers=workers)
    loader = Loader(_Run(remote, stage), processor, 0, 1)
    assert loader.data_fingerprint == native.data_fingerprint, "a run may go on with the one or the other"
    asked = len(server.asked)
    steps = iter(loader)
    begun = [next(steps) for _ in range(3)]
    state = loader.state_dict()
    begun_again = list(Loader(_Run(remote, stage), processor, 0, 1, state=state))
    assert _equal(begun + begun_again, whole)
    assert {method for method, *_ in server.asked[asked:]} == {"GET"}
    ranged = [span for _, name, span in server.asked[asked:] if "images-" in name]
    assert all(ranged), "images alone are moved, never a shard"


def _at_half_weight(copied: tuple[DataConfig, Path], tmp_path: Path) -> tuple[DataConfig, DataConfig]:
    """The files and their copy, in a mixture whose epochs hold another half of the records each."""
    config, out = copied
    config = replace(config, sources={"own": {**config.sources["own"], "weight": 0.5}})
    return config, _read(config, out, tmp_path)


def test_any_position_goes_on_with_the_same_samples(
    copied: tuple[DataConfig, Path], processor: AnchorFormerProcessor, tmp_path: Path
) -> None:
    """Whatever the seed, the batch and the place in an epoch: every rank of 1, 2 and 4 gets what the files give it."""
    mixtures = [Mixture(config, processor) for config in _at_half_weight(copied, tmp_path)]

    @settings(deadline=None, max_examples=60, derandomize=True)
    @given(seed=st.integers(0, 2**40), quarter=st.integers(1, 4), epoch=st.integers(0, 3), consumed=st.integers(0, 5))
    def same(seed: int, quarter: int, epoch: int, consumed: int) -> None:
        digests = set()
        for mixture in mixtures:
            sampler = Sampler(mixture.epoch, len(mixture), 4 * quarter)
            state = sampler.restore({"seed": seed, "epoch": epoch, "consumed": consumed}, seed)
            digest = hashlib.sha256(sampler.digest(seed, 5).encode())
            for _ in range(3):
                numbers = sampler.batch(state)
                for world in (1, 2, 4):
                    plan = plan_step(mixture.tokens[numbers].tolist(), world, 2)
                    dealt = [[[mixture.sample_id(int(numbers[place])) for place in micro] for micro in share]
                             for share in plan]  # fmt: skip
                    digest.update(repr(dealt).encode())
                state = sampler.after(state)
            digests.add(digest.hexdigest())
        assert len(digests) == 1

    same()


def test_order_is_that_of_the_files_at_any_number_of_ranks(
    copied: tuple[DataConfig, Path], processor: AnchorFormerProcessor, tmp_path: Path
) -> None:
    """What every loader yields, by name and hash, at 1, 2 and 4 ranks, from the start and from amid an epoch."""
    stage = _Stage(global_batch=4, epochs=2.5)
    digests, orders = set(), []
    for world in (1, 2, 4):
        for state in (None, {"seed": 3, "epoch": 0, "consumed": 4}):
            for data in _at_half_weight(copied, tmp_path):
                loaders = [Loader(_Run(data, stage), processor, rank, world, state=state) for rank in range(world)]
                digests |= {loader.order_digest for loader in loaders}
                steps = [
                    [[batch.sample_ids for batch in step] for step in parts] for parts in zip(*loaders, strict=True)
                ]
                orders.append((world, state is None, hashlib.sha256(repr(steps).encode()).hexdigest()))
    assert len(digests) == 1
    assert len(set(orders)) == 6, "six cases, and of each the files' order is the copy's"


def test_resuming_reads_nothing_that_is_past(
    served: tuple[DataConfig, Server], processor: AnchorFormerProcessor, tmp_path: Path
) -> None:
    config, server = served
    run = _Run(_read(config, server.url, tmp_path), _Stage(global_batch=1, epochs=1.0))
    Loader(run, processor, 0, 1)  # brings the index
    before = len(server.asked)
    loader = Loader(run, processor, 0, 1, state={"seed": 3, "epoch": 0, "consumed": 11})
    first = next(iter(loader))
    assert [name for batch in first for name in batch.sample_ids] == [Mixture(config, processor).sample_id(
        int(loader._sampler.batch(replace(loader._state, consumed=11))[0]))]  # fmt: skip
    assert [name for _, name, _ in server.asked[before:] if name != MANIFEST and "images-" not in name] == []
    assert sum("images-" in name for _, name, _ in server.asked[before:]) <= 1


def test_index_is_brought_once_and_sent_by_pickle(served: tuple[DataConfig, Server], tmp_path: Path) -> None:
    config, server = served
    remote = _read(config, server.url, tmp_path)
    ((first, _),) = open_sources(remote)
    content = [locate(ref) for ref in first[0].images]
    copies = [name for _, name, _ in server.asked]
    assert sum("records.arrow" in name for name in copies) == 1
    assert sum(method == "HEAD" for method, *_ in server.asked) >= 4, "every shard's size was asked for"
    ((second, _),) = open_sources(remote)
    assert [locate(ref) for ref in pickle.loads(pickle.dumps(second))[0].images] == content
    assert sum("records.arrow" in name for _, name, _ in server.asked) == 1


def test_called_again_it_goes_on(
    filled: Any, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, out = filled.config(), tmp_path / "copy"
    whole = tmp_path / "whole"
    _shard(config, whole, shard_mb=1)

    def killed(ref: Any) -> Any:
        if str(ref.path).endswith("7.png"):
            raise KeyboardInterrupt
        return shard_file.row_of(ref)

    monkeypatch.setattr(writing, "row_of", killed)
    with pytest.raises(KeyboardInterrupt):
        _shard(config, out, shard_mb=1)
    monkeypatch.setattr(writing, "row_of", shard_file.row_of)
    finished = sorted(path.name for path in (out / "own").glob("images-*"))
    assert finished
    assert not (out / MANIFEST).exists()
    assert not list(out.rglob("*.tmp")), "nothing half-written, whatever its name"
    with pytest.raises(UserError, match=r"shards\.json cannot be read"):
        open_sources(_read(config, out, tmp_path))
    with pytest.raises(UserError, match="holds another copy"):
        _shard(config, out, shard_mb=2)
    with (out / "own/journal.jsonl").open("a") as journal:
        journal.write('{"bytes": 3')  # the kill came while a line was written
    (out / "own/images-00009.arrow.123.tmp").write_bytes(b"half")
    read: list[Any] = []
    monkeypatch.setattr(writing, "row_of", lambda ref: read.append(ref) or shard_file.row_of(ref))
    _shard(config, out, shard_mb=1)
    assert len(read) < 8
    assert not list(out.rglob("*.tmp")), "what a kill has left is removed"
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.arrow"))
    assert all((out / file).read_bytes() == (whole / file).read_bytes() for file in files)
    assert (out / MANIFEST).read_text() == (whole / MANIFEST).read_text()
    read.clear()
    _shard(config, out, shard_mb=1)
    assert not read, "a finished copy is left alone"


def test_a_full_disk(filled: Any, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = filled.config(), tmp_path / "copy"
    monkeypatch.setattr(writing, "free_bytes", lambda _: 100)
    with pytest.raises(UserError, match="no room for the sharded copy"):
        _shard(config, out, shard_mb=1)
    monkeypatch.setattr(writing, "free_bytes", lambda _: 10**9)
    plain = shard_file._Hashed.write

    def full(self: Any, content: bytes) -> int:
        if len(list((out / "own").glob("images-*.arrow"))) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(self, content)

    monkeypatch.setattr(shard_file._Hashed, "write", full)
    with pytest.raises(UserError, match="cannot be written") as caught:
        _shard(config, out, shard_mb=1)
    monkeypatch.setattr(shard_file._Hashed, "write", plain)
    assert "it goes on" in caught.value.remedy
    assert len(list((out / "own").glob("images-*"))) == 2
    assert len(_shard(config, out, shard_mb=1).sources["own"].shards) > 2


def test_what_is_not_there_is_refused_or_stays_missing(
    filled: Any, processor: AnchorFormerProcessor, tmp_path: Path
) -> None:
    for index, how in zip((0, 1, 3), ("missing", "truncated", "empty"), strict=True):
        filled.spoil(f"{index}.png", how)
    out = tmp_path / "copy"
    with pytest.raises(UserError, match=r"1 image\(s\) of own are not there") as caught:
        _shard(filled.config(), out)
    assert "0.png" in caught.value.found
    config = filled.config(on_bad_image="skip", max_dropped_share=0.5)
    manifest = _shard(config, tmp_path / "second")
    assert manifest.sources["own"].num_missing == 1
    remote = _read(config, tmp_path / "second", tmp_path)
    stage = _Stage(epochs=1.0)
    native, sharded = (list(Loader(_Run(data, stage), processor, 0, 1)) for data in (config, remote))
    assert sum(batch.num_skipped for step in native for batch in step) == 3
    assert _equal(native, sharded)
    strict = replace(remote, on_bad_image=OnBad.error)
    with pytest.raises(UserError, match=r"sample own/"):
        list(Loader(_Run(strict, stage), processor, 0, 1))
    report = scan(ScanConfig(data=remote, processor="p"), processor)
    assert {name for _, name in report.bad} == {0, 1, 3}


def test_a_record_that_is_not_understood_keeps_its_place(
    filled: Any, processor: AnchorFormerProcessor, tmp_path: Path
) -> None:
    filled.records[5]["conversations"][0]["from"] = "robot"
    with pytest.raises(UserError, match="record 5"):
        _shard(filled.config(), tmp_path / "copy")
    config = filled.config(on_bad_record="skip", max_dropped_share=0.5)
    _shard(config, tmp_path / "copy")
    remote = _read(config, tmp_path / "copy", tmp_path)
    assert Mixture(remote, processor).data_fingerprint == Mixture(config, processor).data_fingerprint
    with pytest.raises(UserError, match="record 5") as caught:
        open_sources(replace(remote, on_bad_record=OnBad.error))
    assert "robot" in caught.value.found


def _answers(status: int) -> Any:
    return lambda handler, content, start: ("images-" in handler.path and not handler.say(status)) or False


@pytest.mark.parametrize(
    ("status", "tries", "found"), [(500, 3, "state 500"), (404, 1, "no such file"), (403, 1, "403")]
)
def test_a_server_that_refuses(
    served: tuple[DataConfig, Server], tmp_path: Path, status: int, tries: int, found: str
) -> None:
    config, server = served
    ((source, _),) = open_sources(_read(config, server.url, tmp_path))
    ref = source[0].images[0]
    server.faults.append(_answers(status))
    before = len(server.asked)
    with pytest.raises(UserError, match=r"images-00000\.arrow cannot be read") as caught:
        locate(ref)
    assert found in caught.value.found
    assert len(server.asked) - before == tries


def test_a_server_that_says_nothing(
    served: tuple[DataConfig, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, server = served
    ((source, _),) = open_sources(_read(config, server.url, tmp_path))
    ref = source[0].images[0]
    over = threading.Event()
    server.faults.append(lambda *_: over.wait(20))
    monkeypatch.setattr(storage, "SECONDS", 0.1)
    with pytest.raises(UserError, match="cannot be read") as caught:
        locate(ref)
    assert "no answer within 0.1 s" in caught.value.found
    over.set()


def test_a_scan_reports_no_image_that_it_could_not_fetch(
    served: tuple[DataConfig, Server], processor: AnchorFormerProcessor, tmp_path: Path
) -> None:
    config, server = served
    remote = _read(config, server.url, tmp_path)
    assert not scan(ScanConfig(data=remote, processor="p"), processor).bad
    server.faults.append(_answers(500))
    with pytest.raises(UserError, match="cannot be read"):
        scan(ScanConfig(data=remote, processor="p"), processor)


def test_a_hiccup_is_passed_over(served: tuple[DataConfig, Server], tmp_path: Path) -> None:
    config, server = served
    ((source, _),) = open_sources(_read(config, server.url, tmp_path))
    ref = source[0].images[0]
    good = locate(ref)
    server.faults += [_once(lambda handler, *_: handler.say(503)), _once(lambda handler, *_: handler.say(206, b"x"))]
    assert locate(ref) == good


def _once(answer: Any) -> Any:
    left = [1]
    return lambda *given: bool(left and left.pop()) and not answer(*given)


def test_a_connection_that_is_cut_and_ranges_that_are_ignored(
    served: tuple[DataConfig, Server], tmp_path: Path
) -> None:
    config, server = served
    ((source, _),) = open_sources(_read(config, server.url, tmp_path))
    ref = source[0].images[0]
    server.faults.append(lambda handler, content, start: not handler.cut(content, start, 10))
    with pytest.raises(UserError, match="cannot be read"):
        locate(ref)
    server.faults.clear()
    server.ranges = False
    before = len(server.asked)
    with pytest.raises(UserError, match="cannot be read") as caught:
        locate(ref)
    assert "range ignored" in caught.value.found
    assert len(server.asked) - before == 1, "a whole shard is not fetched again and again"


def test_damage_is_named(copied: tuple[DataConfig, Path], tmp_path: Path) -> None:
    config, out = copied
    remote = _read(config, out, tmp_path)
    shards = sorted((out / "own").glob("images-*"))
    ((source, _),) = open_sources(remote)
    content = shards[0].read_bytes()
    image = locate(source[0].images[0])
    assert isinstance(image, bytes)
    spoilt = bytearray(content)
    spoilt[content.index(image) + 5] ^= 1
    shards[0].write_bytes(spoilt)
    with pytest.raises(UserError, match=r"images-00000\.arrow is damaged") as caught:
        locate(source[0].images[0])
    assert "images/0.png" in caught.value.found
    with pytest.raises(UserError, match=r"images-00000\.arrow is not what was written"):
        main(["prepare", "shard", "data=llava_558k", "data.root=x", f"out={out}", "verify=true"])
    shards[0].write_bytes(content)
    assert main(["prepare", "shard", "data=llava_558k", "data.root=x", f"out={out}", "verify=true"]) == 0
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    with pytest.raises(UserError, match=r"images-00001\.arrow is not whole"):
        open_sources(replace(remote, cache_dir=str(tmp_path / "third")))
    shards[1].unlink()
    with pytest.raises(UserError, match=r"images-00001\.arrow cannot be read"):
        open_sources(replace(remote, cache_dir=str(tmp_path / "third")))
    assert not list((tmp_path / "third").glob("own*.arrow")), "the index does not appear before its shards are there"
    records = out / "own/records.arrow"
    records.write_bytes(records.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"records\.arrow is not the file that the manifest means"):
        Storage(str(out)).copy("own/records.arrow", tmp_path / "x", records.stat().st_size, "0" * 64)


def test_a_copy_of_something_else(copied: tuple[DataConfig, Path], tmp_path: Path) -> None:
    config, out = copied
    remote = _read(config, out, tmp_path)
    with pytest.raises(UserError, match="written with other options") as caught:
        open_sources(replace(remote, sources={"own": {**config.sources["own"], "images": "elsewhere"}}))
    assert "elsewhere" in caught.value.expected
    with pytest.raises(UserError, match="holds no source theirs"):
        open_sources(replace(remote, sources={"theirs": config.sources["own"]}))
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="another format"):
        open_sources(remote)
    (out / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="no manifest"):
        open_sources(remote)
    with pytest.raises(UserError, match="made of the published files"):
        _shard(remote, tmp_path / "x")


@pytest.mark.parametrize("place", ["https://me:secret@host/x", "https://host/x?signature=secret"])
def test_no_key_is_written_down(corpus: Any, place: str) -> None:
    corpus.add("text")
    with pytest.raises(UserError, match="must not be written down") as caught:
        open_sources(replace(corpus.config(), shards=place))
    assert "secret" not in str(caught.value)


def test_any_place_that_fsspec_knows(copied: tuple[DataConfig, Path], tmp_path: Path) -> None:
    config, out = copied
    fsspec.filesystem("memory").put(str(out), "/copy", recursive=True)
    ((native, _),), ((sharded, _),) = open_sources(config), open_sources(_read(config, "memory://copy", tmp_path))
    (path,) = [locate(ref) for ref in native[1].images]
    assert isinstance(path, Path)
    assert [locate(ref) for ref in sharded[1].images] == [path.read_bytes()]


def test_an_unknown_kind_of_place(corpus: Any) -> None:
    corpus.add("text")
    with pytest.raises(UserError, match="cannot be reached"):
        open_sources(replace(corpus.config(), shards="nope://host/x"))


def test_parquet_rows_and_their_images(tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (9, 8)), None], "talk": [turns, turns[:1]]})
    rows.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "x.parquet"))
    spec = {"_target_": "data.sources.huggingface.HuggingfaceConfig", "dataset": "x.parquet", "conversations": "talk"}
    config = DataConfig(root=str(tmp_path), sources={"hf": spec}, cache_dir=str(tmp_path / "cache"))
    _shard(config, tmp_path / "copy")
    ((native, _),), ((sharded, _),) = open_sources(config), open_sources(_read(config, tmp_path / "copy", tmp_path))
    assert sharded.fingerprint == native.fingerprint
    assert [sharded.record_id(index) for index in range(2)] == ["#0", "#1"]
    assert locate(sharded[0].images[0]) == locate(native[0].images[0])
    assert sharded[1] == native[1]


def test_texts_alone(corpus: Any, tmp_path: Path) -> None:
    corpus.add("text")
    config = corpus.config()
    _shard(config, tmp_path / "copy")
    ((source, _),) = open_sources(_read(config, tmp_path / "copy", tmp_path))
    assert source[0].images == ()


def test_the_command(filled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled.write()
    own = "data.sources.captions"
    words = ["data=miniworld_align", f"data.root={filled.root}", f"{own}.annotations=records.json",
             f"{own}.images=images", f"data.cache_dir={tmp_path / 'cache'}", f"out={tmp_path / 'copy'}"]  # fmt: skip
    assert main(["prepare", "shard", *words]) == 0
    shown = capsys.readouterr().out
    assert "captions: 12 records, 8 images, 1 shards" in shown
    assert f"data.shards={tmp_path / 'copy'}" in shown
    with pytest.raises(UserError, match="unknown key 'shard_md'"):
        main(["prepare", "shard", *words, "shard_md=3"])
