"""The world on disk, in the published formats of LLaVA-558k, LLaVA-665k, DocVQA and ChartQA."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from miniworld.config import WorldConfig
from miniworld.texts import DESCRIBE
from miniworld.world import DOMAINS, Entry, Split, entry

Json = dict[str, Any]


def write_world(config: WorldConfig, root: Path) -> dict[str, int]:
    """Writes all four datasets below `root`; the same config gives the same bytes.

    Returns:
        Number of records per annotation file.
    """
    # Spawned, because the caller has torch's threads running, which a fork would tear apart.
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), mp_context=spawned) as pool:
        writer = _Writer(config, root, pool)
        records = {
            "llava_pretrain/captions.json": writer.captions(Split.train, config.captions),
            "llava_pretrain/captions_val.json": writer.captions(Split.val, config.val),
            "llava_instruct/mix.json": writer.conversations(),
            "llava_instruct/val.json": writer.scene_questions(),
            "docvqa/train_v1.0.json": writer.docvqa(Split.train),
            "docvqa/val_v1.0.json": writer.docvqa(Split.val),
        }
        for split in Split:
            human, augmented = writer.chartqa(split)
            records[f"chartqa/ChartQA Dataset/{split.value}/{split.value}_human.json"] = human
            records[f"chartqa/ChartQA Dataset/{split.value}/{split.value}_augmented.json"] = augmented
    for name, content in records.items():
        (root / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return {name: len(content["data"] if isinstance(content, dict) else content) for name, content in records.items()}


class _Writer:
    def __init__(self, config: WorldConfig, root: Path, pool: ProcessPoolExecutor) -> None:
        self.config, self.root, self.pool = config, root, pool

    def captions(self, split: Split, count: int) -> list[Json]:
        records = self._each(DOMAINS, split, "captions", count, "llava_pretrain/images", _caption)
        return _mixed(records, self.config.seed)

    def conversations(self) -> list[Json]:
        tell = partial(_conversation, turns=self.config.turns)
        records = self._each(DOMAINS, Split.train, "instruct", self.config.instruct, "llava_instruct/images", tell)
        for index in range(self.config.text_only):
            domain = tuple(DOMAINS)[index % len(DOMAINS)]
            item = entry(domain, Split.train, "text", index, self.config.seed)
            records.append(_text_only(item, f"text_{index:06d}", turns=self.config.turns))
        return _mixed(records, self.config.seed)

    def scene_questions(self) -> list[Json]:
        return self._each(
            ["scene"], Split.val, "val", self.config.val, "llava_instruct/images", _short_answers, self._count
        )

    def docvqa(self, split: Split) -> Json:
        count = self.config.single if split is Split.train else self.config.val
        folder = "docvqa/documents"
        asked = self._each(["doc"], split, "docvqa", count, folder, _docvqa, self._count)
        data = [{"questionId": index, **record, "data_split": split.value} for index, record in enumerate(asked)]
        return {"dataset_name": "miniworld", "dataset_version": "1.0", "dataset_split": split.value, "data": data}

    def chartqa(self, split: Split) -> tuple[list[Json], list[Json]]:
        count = self.config.single if split is Split.train else self.config.val
        folder = f"chartqa/ChartQA Dataset/{split.value}/png"
        asked = self._each(["chart"], split, "chartqa", count, folder, _chartqa, self._count)
        # ChartQA's human questions reason, its augmented ones mostly read a value.
        human = [record["row"] for record in asked if record["human"]]
        return human, [record["row"] for record in asked if not record["human"]]

    @property
    def _count(self) -> int:
        return self.config.questions_per_single

    def _each(
        self, domains: Iterable[str], split: Split, stream: str, count: int, folder: str,
        tell: Callable[..., list[Json]], *arguments: int,
    ) -> list[Json]:  # fmt: skip
        """Draws `count` pictures per domain into `folder` and collects what `tell` says about each."""
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        make = partial(_make, split, stream, self.config.seed, self.root / folder, tell, arguments)
        jobs = [(domain, index) for domain in domains for index in range(count)]
        bar = tqdm(total=len(jobs), desc=f"drawing {folder} ({split.value})", unit="img", leave=False)
        records: list[Json] = []
        with bar:
            for made in self.pool.map(make, jobs, chunksize=100):
                records += made
                bar.update()
        return records


def _make(
    split: Split, stream: str, seed: int, folder: Path, tell: Callable[..., list[Json]], arguments: tuple[int, ...],
    job: tuple[str, int],
) -> list[Json]:  # fmt: skip
    domain, index = job
    item = entry(domain, split, stream, index, seed)
    name = f"{split.value}_{domain}_{index:06d}"
    png = io.BytesIO()
    item.draw().save(png, format="PNG", compress_level=1)
    (folder / f"{name}.png").write_bytes(png.getvalue())
    return tell(item, name, *arguments)


def _caption(item: Entry, name: str) -> list[Json]:
    turns = [("human", f"<image>\n{DESCRIBE}"), ("gpt", item.caption)]
    return [{"id": name, "image": f"{name}.png", "conversations": _turns(turns)}]


def _conversation(item: Entry, name: str, turns: int) -> list[Json]:
    return [{"id": name, "image": f"images/{name}.png", "conversations": _dialogue(item, "<image>", turns)}]


def _text_only(item: Entry, name: str, turns: int) -> Json:
    return {"id": name, "conversations": _dialogue(item, item.caption, turns)}


def _dialogue(item: Entry, first: str, turns: int) -> list[Json]:
    said: list[tuple[str, str]] = []
    for question in item.questions()[:turns]:
        said += [("human", question.text), ("gpt", question.answer)]
    said[0] = ("human", f"{first}\n{said[0][1]}")
    return _turns(said)


def _turns(said: list[tuple[str, str]]) -> list[Json]:
    return [{"from": speaker, "value": value} for speaker, value in said]


def _short_answers(item: Entry, name: str, count: int) -> list[Json]:
    return [
        {"question_id": f"{name}_{index}", "image": f"images/{name}.png", "question": question.text,
         "answer": question.answer, "question_type": question.template}
        for index, question in enumerate(item.questions()[:count])
    ]  # fmt: skip


def _docvqa(item: Entry, name: str, count: int) -> list[Json]:
    return [
        {"question": question.text, "question_types": [question.template], "image": f"documents/{name}.png",
         "docId": int(name.rpartition("_")[2]), "ucsf_document_id": name, "ucsf_document_page_no": "1",
         "answers": [question.answer]}
        for question in item.questions()[:count]
    ]  # fmt: skip


def _chartqa(item: Entry, name: str, count: int) -> list[Json]:
    return [
        {"human": question.reasoning,
         "row": {"imgname": f"{name}.png", "query": question.text, "label": question.answer}}
        for question in item.questions()[:count]
    ]  # fmt: skip


def _mixed(records: list[Json], seed: int) -> list[Json]:
    # Published files are not sorted by kind either; readers that take the first records get all domains.
    random.Random(seed).shuffle(records)
    return records
