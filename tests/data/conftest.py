"""What the data room's tests share: a small real processor, and datasets of a few records in each native format."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from anchorformer.images import ImageTransform
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.schema import parse
from data.config import DataConfig

ANCHORS = 5


@pytest.fixture(scope="session")
def processor() -> AnchorFormerProcessor:
    """The real processor around a byte-level tokenizer made here: one token per byte, roughly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["question answer"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}"
        "{{ eos_token }}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}",
    )
    return AnchorFormerProcessor(ImageTransform(14, (1, 2, 3)), fast, num_image_tokens=ANCHORS, template="chat")


POINTER = b"version https://git-lfs.github.com/spec/v1\n"


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@dataclass
class Corpus:
    """A folder in LLaVA's format that a test fills record by record."""

    root: Path
    records: list[dict[str, Any]] = field(default_factory=list)

    def image(self, name: str, size: tuple[int, int] = (20, 16), mode: str = "RGB", **options: Any) -> Path:
        path = self.root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = len(list(path.parent.iterdir()))
        colour: Any = (shade, 7, 9, 11)[: len(mode)] if len(mode) > 1 else shade
        Image.new(mode, size, colour).save(path, **options)
        return path

    def spoil(self, name: str, how: str) -> None:
        """Damages an image: missing, empty, truncated, text (a git-LFS pointer) or bomb (a header of 10^10 pixels)."""
        path = self.root / "images" / name
        content = path.read_bytes()
        path.unlink()
        if how == "bomb":
            path.write_bytes(_png_header(100_000, 100_000))
        elif how != "missing":
            path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": POINTER}[how])

    def add(self, record_id: Any, image: Any = None, question: str = "what?", answer: str = "this") -> None:
        images = [] if image is None else image if isinstance(image, list) else [image]
        record = {
            "id": record_id,
            "conversations": [
                {"from": "human", "value": "<image>\n" * len(images) + question},
                {"from": "gpt", "value": answer},
            ],
        }
        self.records.append({**record, "image": image} if images else record)

    def write(self) -> dict[str, Any]:
        """Writes the file; returns the source's plug-in."""
        (self.root / "images").mkdir(parents=True, exist_ok=True)
        (self.root / "records.json").write_text(json.dumps(self.records))
        return {"_target_": "data.sources.llava.LlavaConfig", "annotations": "records.json", "images": "images"}

    def config(self, **values: Any) -> DataConfig:
        sources = values.pop("sources", None) or {"own": self.write()}
        return parse(
            DataConfig,
            {"root": str(self.root), "sources": sources, "cache_dir": str(self.root / "cache"), **values},
            "data",
        )


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


@pytest.fixture
def filled(corpus: Corpus) -> Corpus:
    """Twelve records of uneven length, every third of them without an image."""
    for index in range(12):
        has_image = index % 3 != 2
        if has_image:
            corpus.image(f"{index}.png")
        corpus.add(index, f"{index}.png" if has_image else None, "why" * (index + 1), "so" * (12 - index))
    return corpus


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[[str, Any], Path]:
    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write
