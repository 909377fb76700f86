"""The data doctor: walks every record and image of a mixture, and reports what training would stumble over."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from anchorformer.contracts import IGNORE_INDEX
from anchorformer.errors import UserError
from anchorformer.processing import AnchorFormerProcessor
from data.admission import explain, shortened
from data.config import DataConfig, Overlength
from data.encoder import fingerprint, turns_of
from data.examine import Finding, examine_image, examine_record
from data.images import load
from data.lengths import UNUSABLE, measure
from data.mixture import open_sources
from data.record import ImageRef, Record
from data.scan_config import ScanConfig
from data.sources.base import Source
from data.verdicts import Defect

T = TypeVar("T")
R = TypeVar("R")

GREEN, DIM, PLAIN = "\033[32;1m", "\033[2m", "\033[0m"

EXAMPLES = 3
"""How many ids a line of the table names."""


@dataclass(slots=True)
class Report:
    """Findings by source, in the order of the records.

    Attributes:
        totals: source -> records scanned.
        findings: (source, record id, finding).
        bad: (source, record number) of the records that training would refuse or leave out.
        flawless: source -> records that nothing was found in.
    """

    totals: dict[str, int] = field(default_factory=dict)
    findings: list[tuple[str, str, Finding]] = field(default_factory=list)
    bad: set[tuple[str, int]] = field(default_factory=set)
    flawless: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Records scanned."""
        return sum(self.totals.values())

    @property
    def bad_share(self) -> float:
        return len(self.bad) / max(self.total, 1)

    def table(self) -> str:
        """Per source, how many records nothing was found in; then one line per defect: how many, and the first ids."""
        grouped: dict[tuple[str, Defect], list[tuple[str, str]]] = defaultdict(list)
        for source, record_id, finding in self.findings:
            grouped[source, finding.defect].append((record_id, finding.detail))
        width = max(map(len, ["source", *self.totals]))
        lines = [f"{'source':{width}}  {'':4} {'records':>8}  defect"]
        lines += [
            f"{source:{width}}  {'ok':4} {self.flawless[source]:8}  nothing found, of {total}"
            for source, total in self.totals.items()
        ]
        order = list(Defect)
        for (source, defect), hits in sorted(grouped.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
            shown = ", ".join(f"{record_id} ({detail})" for record_id, detail in hits[:EXAMPLES])
            more = ", ..." if len(hits) > EXAMPLES else ""
            mark = "BAD" if defect.is_bad else "note"
            lines.append(f"{source:{width}}  {mark:4} {len(hits):8}  {defect.value}: {shown}{more}")
        lines.append(f"{len(self.bad)} of {self.total} records ({self.bad_share:.2%}) cannot be used as they are")
        return "\n".join(lines)


def scan(config: ScanConfig, processor: AnchorFormerProcessor) -> Report:
    """Opens every source of the mixture and examines all of it; the same data gives the same report.

    Raises:
        UserError: what opening a source raises; defects of records and images are reported instead.
    """
    report = Report()
    for source, _ in open_sources(config.whole):
        found: dict[int, list[Finding]] = defaultdict(list)
        for index, finding in (*_texts(source, processor, config.data), *_images(source, config.threads)):
            found[index].append(finding)
        report.totals[source.name] = len(source)
        report.flawless[source.name] = len(source) - len(found)
        for index in sorted(found):
            name = source.record_id(index)
            report.findings += [(source.name, name, finding) for finding in found[index]]
            if any(finding.defect.is_bad for finding in found[index]):
                report.bad.add((source.name, index))
    if config.out is not None:
        lines = [
            json.dumps({"source": source, "id": name, "defect": finding.defect.value, "detail": finding.detail})
            for source, name, finding in report.findings
        ]
        Path(config.out).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return report


def samples(config: ScanConfig, processor: AnchorFormerProcessor) -> Iterator[str]:
    """The first usable record of each source in turn, until enough are shown, as the model will be trained on it."""
    sources = [source for source, _ in open_sources(config.whole)]
    places = ((source, index) for index in range(max(map(len, sources))) for source in sources if index < len(source))
    usable = (text for source, index in places if (text := _sample(source, index, processor)) is not None)
    yield from islice(usable, config.show)


def _texts(source: Source, processor: AnchorFormerProcessor, config: DataConfig) -> Iterator[tuple[int, Finding]]:
    encoder_fingerprint = fingerprint(processor)
    lengths = measure(source, processor, encoder_fingerprint, Path(config.cache_dir))
    short: set[int] = set()
    if config.overlength is Overlength.truncate_answer:
        short.update(shortened(source, processor, encoder_fingerprint, config, lengths)[0].tolist())
    for index in tqdm(range(len(source)), desc=f"records of {source.name}", unit=" records", delay=2, mininterval=0.5):
        record = _understood(source, index)
        if isinstance(record, UserError):
            yield index, Finding(Defect.malformed, record.found)
            continue
        findings = examine_record(record)
        tokens, supervised = int(lengths.tokens[index]), int(lengths.supervised[index])
        if tokens == UNUSABLE and not any(finding.defect is Defect.mismatch for finding in findings):
            findings.append(Finding(Defect.refused, _reason(source, processor, index)))
        if supervised == 0:
            findings.append(Finding(Defect.no_targets, f"{tokens} positions"))
        if tokens > config.max_length:
            detail = f"{tokens} of {config.max_length} positions"
            findings.append(Finding(Defect.shortened if index in short else Defect.too_long, detail))
        yield from ((index, finding) for finding in findings)


def _images(source: Source, threads: int) -> Iterator[tuple[int, Finding]]:
    """Examines each file once, however many records show it; encoded bytes are examined record by record."""
    users: dict[Path, list[int]] = defaultdict(list)
    embedded: list[tuple[int, int]] = []
    refs: dict[Path, ImageRef] = {}
    for index in tqdm(range(len(source)), desc=f"images of {source.name}", unit=" records", delay=2, mininterval=0.5):
        record = _understood(source, index)
        for place, ref in enumerate(() if isinstance(record, UserError) else record.images):
            if ref.path is None:
                embedded.append((index, place))
            elif index not in users[ref.path][-1:]:
                users[ref.path].append(index)
                refs.setdefault(ref.path, ref)
    first_with: dict[str, str] = {}

    def findings_of(name: str, found: list[Finding], digest: str | None) -> list[Finding]:
        # Two records may well show one file; one picture in two files may mean that held-out images leaked.
        twin = name if digest is None else first_with.setdefault(digest, name)
        return found if twin == name else [*found, Finding(Defect.duplicate_image, f"same bytes as {twin}")]

    workers = threads or len(os.sched_getaffinity(0))
    total = len(users) + len(embedded)
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=total, desc=f"decoding images of {source.name}", unit=" images", delay=2, mininterval=0.5) as bar,
    ):
        for path, (found, digest) in zip(refs, _mapped(pool, examine_image, refs.values()), strict=True):
            bar.update()
            for finding in findings_of(path.name, found, digest):
                yield from ((index, finding) for index in users[path])
        cells = (source[index].images[place] for index, place in embedded)
        for (index, place), (found, digest) in zip(embedded, _mapped(pool, examine_image, cells), strict=True):
            bar.update()
            name = f"{source.record_id(index)}[{place}]"
            yield from ((index, finding) for finding in findings_of(name, found, digest))


def _mapped(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`pool.map` in order, without queueing half a million images first."""
    iterator = iter(items)
    while block := list(islice(iterator, 256)):
        yield from pool.map(function, block)


def _understood(source: Source, index: int) -> Record | UserError:
    """The record, or why it is none."""
    try:
        return source[index]
    except UserError as error:
        return error


def _reason(source: Source, processor: AnchorFormerProcessor, index: int) -> str:
    try:
        explain(source, processor, index)
    except UserError as error:
        return f"{error.what.partition(': ')[2]}: {error.found}"
    return "refused when it was counted, accepted now"


def _sample(source: Source, index: int, processor: AnchorFormerProcessor) -> str | None:
    """The record as text, what is supervised in colour, or None where it cannot be encoded."""
    record = _understood(source, index)
    if isinstance(record, UserError) or examine_record(record):
        return None
    name = f"{source.name}/{record.id}"
    try:
        example = processor.encode(turns_of(record), [load(ref) for ref in record.images], sample_id=name)
    except UserError:
        return None
    ids, labels = example.input_ids_S.tolist(), example.labels_S.tolist()
    # NO_COLOR (no-color.org) asks for text that reads without colours.
    start, end, dim = ("«", "»", "") if os.environ.get("NO_COLOR") else (GREEN, PLAIN, DIM)
    text = ""
    marks = (
        "image" if token == processor.image_token_id else "target" if label != IGNORE_INDEX else "read"
        for token, label in zip(ids, labels, strict=True)
    )
    position = 0
    for mark, run in groupby(marks):
        length = len(list(run))
        if mark == "image":
            text += f"{dim}[{length} anchors]{end if dim else ''}"
        else:
            piece = processor.tokenizer.decode(ids[position : position + length])
            text += f"{start}{piece}{end}" if mark == "target" else piece
        position += length
    supervised = sum(label != IGNORE_INDEX for label in labels)
    return f"{name}: {len(ids)} positions, {supervised} supervised, {len(record.images)} image(s)\n{text}\n"
