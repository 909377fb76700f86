"""Three captions on disk and the command line of a run on them, for tests that start from the command line."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image


def write_world(folder: Path, backbones: Path) -> list[str]:
    """Writes `folder/data` and returns overrides of an align run that keeps everything below `folder`."""
    images = folder / "data" / "images"
    images.mkdir(parents=True)
    records = []
    for number in range(3):
        Image.new("RGB", (28, 28), (80 * number, 0, 0)).save(images / f"{number}.png")
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"a circle {number}"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "data" / "captions.json").write_text(json.dumps(records))
    return [
        "stage=align", "data=llava_558k", "hardware=cpu", "connector=anchor_former_tiny", "selector=anchor_tiny",
        "model.selector.num_anchors=9", f"data.root={folder}/data", f"data.cache_dir={folder}/cache",
        "data.sources.llava_558k.annotations=captions.json", "data.sources.llava_558k.images=images",
        f"model.vision={backbones}/clip", f"model.language_model={backbones}/llama",
        f"output_root={folder}/checkpoints", "stage.template=chat",
    ]  # fmt: skip
