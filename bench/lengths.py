"""How long instruction samples are: counted once from annotation files, numbers only, and an assumed mixture beside it.

    python -m bench.lengths --tokenizer FOLDER --json bench/lengths.json FILE.json [FILE.json ...]

reads LLaVA's conversation format through the project's own source and processor. `bench/lengths.json` came from the
749 records of LLaVA-665k that FasterVLM's repository shows as a sample and from two small sets of 84 and 159 records in
the same format, with Llama 2's tokenizer (32,000 pieces) and the `v1` template.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from anchorformer.errors import UserError
from anchorformer.images import ImageTransform
from anchorformer.processing import AnchorFormerProcessor
from data.encoder import turns_of
from data.sources.llava import LlavaConfig

FILE = Path(__file__).with_suffix(".json")

MAX_LENGTH = 2048
"""LLaVA-1.5's: a longer sample loses its end."""

MIXTURE = {
    # thousand samples, mean and spread (sigma of the logarithm) of their text tokens, with an image
    "llava_instruct": (158, 260, 0.6, True),
    "sharegpt": (41, 1100, 0.8, False),
    "vqav2": (83, 220, 0.5, True),
    "gqa": (72, 220, 0.5, True),
    "okvqa": (9, 130, 0.4, True),
    "ocrvqa": (80, 250, 0.5, True),
    "aokvqa": (66, 180, 0.5, True),
    "textcaps": (22, 80, 0.3, True),
    "refcoco": (48, 350, 0.6, True),
    "visual_genome": (86, 350, 0.6, True),
}
"""LLaVA-665k's sources by size (its paper, table 7); what is said of their lengths is an assumption."""


@dataclass(frozen=True)
class Lengths:
    """Samples, one entry each.

    Attributes:
        text: positions without images.
        images: how many.
        supervised: tokens that are learned from.
        words: what LLaVA's sampler calls length: words of all turns, images not counted.
    """

    text: list[int]
    images: list[int]
    supervised: list[int]
    words: list[int]

    def positions(self, image_tokens: int) -> list[int]:
        """Positions of each sample with `image_tokens` per image, cut at `MAX_LENGTH`."""
        return [min(text + image_tokens * n, MAX_LENGTH) for text, n in zip(self.text, self.images, strict=True)]


def real() -> Lengths:
    """The committed counts."""
    return Lengths(**json.loads(FILE.read_text()))


def mixture(count: int, seed: int = 0) -> Lengths:
    """Random samples of the assumed mixture; words are put at three quarters of the tokens, half are supervised."""
    generator = torch.Generator().manual_seed(seed)
    sources = list(MIXTURE.values())
    weights = torch.tensor([float(source[0]) for source in sources])
    drawn = [sources[i] for i in torch.multinomial(weights, count, replacement=True, generator=generator).tolist()]
    normal = torch.randn(count, generator=generator).tolist()
    text = [
        max(16, round(mean * float(torch.tensor(sigma * z - sigma**2 / 2).exp())))
        for (_, mean, sigma, _), z in zip(drawn, normal, strict=True)
    ]
    return Lengths(
        text=text,
        images=[int(source[3]) for source in drawn],
        supervised=[tokens // 2 for tokens in text],
        words=[tokens * 3 // 4 for tokens in text],
    )


def count(files: Sequence[Path], tokenizer: Path) -> Lengths:
    """Counts the records of annotation files; those that the processor refuses are left out and named."""
    processor = AnchorFormerProcessor(ImageTransform(32, (0, 0, 0)), AutoTokenizer.from_pretrained(tokenizer), 1)
    lengths = Lengths([], [], [], [])
    with tempfile.TemporaryDirectory() as cache:
        for number, file in enumerate(files):
            source = LlavaConfig(annotations=file.name).open(f"file{number}", file.parent, Path(cache))
            for index in range(len(source)):
                record = source[index]
                try:
                    positions, supervised = processor.measure(turns_of(record), len(record.images))
                except UserError as error:
                    print(f"{file.name}: {record.id} is left out: {error.what}")
                    continue
                lengths.text.append(positions - len(record.images))
                lengths.images.append(len(record.images))
                lengths.supervised.append(supervised)
                lengths.words.append(sum(len(turn.text.split()) for turn in record.turns))
    return lengths


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lengths", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the language model's tokenizer")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    lengths = count([file.resolve() for file in arguments.files], arguments.tokenizer)
    arguments.json.write_text(json.dumps(vars(lengths)) + "\n")
    print(f"{len(lengths.text)} samples, {sum(lengths.text) / len(lengths.text):.0f} text tokens on average")


if __name__ == "__main__":
    main()
