"""Whatever Hugging Face `datasets` opens (parquet, a saved dataset, a hub id), with columns named by config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from anchorformer.errors import UserError
from anchorformer.schema import to_plain
from data.annotations import RecordError, check_text
from data.record import ImageRef, Record, Role, Turn
from data.sources.base import SourceConfig
from data.sources.local import IMAGE
from data.sources.splits import of_split

SPEAKERS = {
    "human": Role.user, "user": Role.user, "gpt": Role.assistant, "assistant": Role.assistant, "system": Role.system,
}  # fmt: skip
"""Names of the speakers in LLaVA's `{from, value}` and in chat `{role, content}` turns."""


@dataclass(frozen=True, kw_only=True)
class HuggingfaceConfig(SourceConfig):
    """Rows with an image column and either a conversation column or a question and an answer column."""

    dataset: str
    """Folder below `data.root` (parquet files, or written by `save_to_disk`), one parquet file, or a hub id."""
    split: str = "train"
    """Split; of a folder of parquet files those whose names say so, all where no name speaks of splits."""
    subset: str | None = None
    """Configuration of a hub dataset; of its local copy, the folder of that name."""
    id: str | None = None
    """Column of ids; null numbers the rows."""
    image: str | None = "image"
    """Column of one image, a list of them, or nothing in a row without; null where no row has one."""
    conversations: str | None = None
    """Column of turns, `{from, value}` or `{role, content}`; `<image>` in a user's turn stands for the next image."""
    question: str | None = None
    """Column of questions, with `answers`; `<image>` is put in front, once per image."""
    answers: str | None = None
    """Column of one answer or a list: the first is trained, all are accepted."""
    prompt_suffix: str = ""
    """Put after each question."""

    def __post_init__(self) -> None:
        asked = (self.question is not None, self.answers is not None)
        if asked not in ((True, True), (False, False)) or asked[0] == (self.conversations is not None):
            raise UserError(
                "the columns of a Hugging Face source are not clear",
                found=f"conversations={self.conversations}, question={self.question}, answers={self.answers}",
                expected="either conversations, or question and answers",
                remedy="name one or the other and null the rest",
            )

    def open(self, name: str, root: Path, cache_dir: Path) -> HuggingfaceSource:
        local = root / self.dataset
        try:
            rows, version = self._load(local, cache_dir)
        except (FileNotFoundError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
            raise UserError(
                f"data.sources.{name}: the dataset cannot be opened",
                found=str(error).split("\n")[0][:300],
                expected=f"parquet files or a saved dataset in {local}, or a hub id, with split {self.split}",
                remedy="check dataset, split and subset; offline, only local folders and what is cached can be opened",
            ) from None
        named = (self.id, self.image, self.conversations, self.question, self.answers)
        absent = [column for column in named if column is not None and column not in rows.column_names]
        if absent:
            raise UserError(
                f"data.sources.{name}: column(s) missing",
                found=f"no {', '.join(absent)}; there are " + ", ".join(rows.column_names),
                expected="the columns that the config names",
                remedy=f"set data.sources.{name}.image, .conversations, .question, .answers and .id, or null them",
            )
        options = {key: value for key, value in to_plain(self).items() if key not in ("weight", "dataset")}
        fingerprint = hashlib.sha256(json.dumps([version, options], sort_keys=True).encode()).hexdigest()[:32]
        return HuggingfaceSource(name, fingerprint, self, rows, root.resolve())

    def _load(self, local: Path, cache_dir: Path) -> tuple[datasets.Dataset, str]:
        """The rows with images left encoded, and what identifies them."""
        if (local / "dataset_info.json").is_file() or (local / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(local))
            if isinstance(loaded, datasets.DatasetDict) and self.split not in loaded:
                raise ValueError(f"splits {sorted(loaded)} in {local}")
            rows = loaded[self.split] if isinstance(loaded, datasets.DatasetDict) else loaded
            version = _stamp(sorted(local.rglob("*")))
        elif local.is_dir() or local.is_file():
            folder = local if self.subset is None else local / self.subset
            files = [local] if local.is_file() else of_split(sorted(folder.rglob("*.parquet")), folder, self.split)
            if not files:
                raise FileNotFoundError(f"no *.parquet in {folder}")
            rows = datasets.load_dataset(
                "parquet",
                data_files={self.split: [str(file) for file in files]},
                split=self.split,
                cache_dir=str(cache_dir / "datasets"),
            )
            version = _stamp(files)
        else:
            rows = datasets.load_dataset(
                self.dataset, self.subset, split=self.split, cache_dir=str(cache_dir / "datasets")
            )
            version = f"{rows.builder_name} {rows.info.version} {rows._fingerprint}"
        if self.image is not None and self.image in rows.column_names:
            rows = rows.cast_column(self.image, _encoded(rows.features[self.image]))
        return rows, version


class HuggingfaceSource:
    """A `Source` over a memory-mapped dataset; a row is read when it is asked for."""

    def __init__(
        self, name: str, fingerprint: str, config: HuggingfaceConfig, rows: datasets.Dataset, root: Path
    ) -> None:
        self.name, self.fingerprint = name, fingerprint
        self._config, self._rows, self._root = config, rows, root

    def __len__(self) -> int:
        return len(self._rows)

    def record_id(self, index: int) -> str:
        """Ids of the file may repeat, so the row number is always part of it."""
        column = self._config.id
        return f"#{index}" if column is None else f"{self._rows.select_columns([column])[index][column]}#{index}"

    def check_records(self) -> None:
        """Nothing: a row is first looked at when it is read."""

    def __getitem__(self, index: int) -> Record:
        try:
            record = self._record(self._rows[index], self.record_id(index))
            check_text(record)
            return record
        except (RecordError, UnicodeDecodeError) as error:  # a column of text need not be UTF-8
            raise UserError(
                f"{self.name}: row {index} of {self._config.dataset} cannot be used",
                found=error,
                expected="a row in the form that the config names",
                remedy="correct or remove that row",
            ) from None

    def _record(self, row: dict[str, Any], record_id: str) -> Record:
        config = self._config
        cell = None if config.image is None else row[config.image]
        images = tuple(self._image(item) for item in (cell if isinstance(cell, list) else [cell]) if item is not None)
        if config.conversations is not None:
            return Record(id=record_id, images=images, turns=_turns(row[config.conversations]))
        assert config.question is not None
        assert config.answers is not None
        question, answers = row[config.question], row[config.answers]
        answers = [answers] if isinstance(answers, str) else answers or []
        if not isinstance(question, str) or not all(isinstance(answer, str) for answer in answers):
            raise RecordError(f"question {question!r} and answers {answers!r} are not text")
        asked = "".join(f"{IMAGE}\n" for _ in images) + question + config.prompt_suffix
        answered = [Turn(Role.assistant, answers[0])] if answers else []
        return Record(id=record_id, images=images, turns=(Turn(Role.user, asked), *answered), references=tuple(answers))

    def _image(self, item: dict[str, Any]) -> ImageRef:
        if item.get("bytes") is not None:
            return ImageRef(data=item["bytes"])
        if not item.get("path"):
            raise RecordError(f"an image holds neither bytes nor a path: {item}")
        if "\0" in item["path"]:
            raise RecordError(f"image path is {item['path']!r}, not a file name")
        return ImageRef(path=self._root / item["path"], roots=(self._root,))


def _turns(conversations: Any) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise RecordError(f"the conversation is {conversations!r}, not a list of turns")
    turns = []
    for turn in conversations:
        spoken = turn if isinstance(turn, dict) else {}
        role = SPEAKERS.get(str(spoken.get("from", spoken.get("role"))))
        text = spoken.get("value", spoken.get("content"))
        if role is None or not isinstance(text, str):
            raise RecordError(f"not a turn of {', '.join(SPEAKERS)} with text: {str(turn)[:80]}")
        turns.append(Turn(role, text))
    return tuple(turns)


def _encoded(feature: Any) -> Any:
    """The column's type with decoding switched off: images are opened by our own rules."""
    encoded = datasets.Image(decode=False)
    return datasets.List(encoded) if isinstance(feature, (datasets.List, datasets.LargeList)) else encoded


def _stamp(files: Sequence[Path]) -> str:
    """Names, sizes and times of the files: hashing hundreds of gigabytes of images would take longer than training."""
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
