"""The model card of a run: what it was made of and how it scores, from the run's files alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from anchorformer.schema import TARGET
from train.choices import Part
from train.config import RunConfig
from train.run.folder import RunFolder

USE = """```python
import anchorformer.auto  # makes the classes known to transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "path/of/this/folder"
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
inputs = processor(images=Image.open("image.png"), conversations=[[("user", "<image>\\nWhat is this?")]])
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=64), skip_special_tokens=True)[0])
```"""
ATTACH = """This folder holds the connector alone. `python -m anchorformer.connector_folder THIS_FOLDER OUT` fetches the
vision tower and the language model that it was trained between, compares them by hash, and writes the whole model."""
CAUTION = (
    "It answers as the language model and the data taught it, wrongly at times, and with their biases; the cards and "
    "licences of the base models hold for it too. The scores above are all that has been measured."
)


def card(run: RunFolder, *, is_connector: bool) -> str:
    """Markdown with the metadata that model hubs read in front."""
    config = run.read_config()
    environment = json.loads(run.environment.read_bytes())
    model = config.model
    head = {"library_name": "transformers", "pipeline_tag": "image-text-to-text",
            "base_model": [model.vision, model.language_model], "tags": ["anchorformer", "visual-anchors"]}  # fmt: skip
    lines = [
        "---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "",
        f"# {config.run}", "",
        f"AnchorFormer: {model.vision} and {model.language_model}, joined by a trained connector.", "",
        ATTACH if is_connector else USE, "",
        "## How it was trained", "",
        *_table(("", ""), list(_recipe(config, environment))), "",
        *(f"Stage before: `{config.init_from}`\n" for _ in range(config.init_from is not None)),
        "```", " ".join(["python -m train", *environment["command"][1:]]), "```", "",
        "## Scores", "", *_scores(run), "",
        "## What to keep in mind", "",
        CAUTION, "",
    ]  # fmt: skip
    return "\n".join(lines)


def _recipe(config: RunConfig, environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    stage, model = config.stage, config.model
    yield "stage", stage.name.value
    trained = {Part(part).value: settings.lr for part, settings in stage.trains.items()}
    yield "trained (learning rate)", ", ".join(f"{part} ({lr:g})" for part, lr in trained.items())
    yield "selector", _plugin(model.selector)
    yield "connector", _plugin(model.connector)
    if model.integration is not None:
        yield "integration (experimental)", _plugin(model.integration)
    if model.tiling.grids:
        yield "tiling", json.dumps([list(grid) for grid in model.tiling.grids])
    yield (
        "data",
        ", ".join(f"{name} (weight {source.get('weight', 1.0):g})" for name, source in config.data.sources.items()),
    )
    yield "global batch", str(stage.global_batch)
    yield "length", f"{stage.max_steps} steps" if stage.max_steps else f"{stage.epochs:g} epoch(s)"
    yield "seed", str(config.seed)
    yield "versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    yield (
        "code",
        f"commit {environment['commit']}"
        + (" with changes that are not in it" if environment["uncommitted_changes"] else ""),
    )


def _plugin(values: Mapping[str, Any]) -> str:
    own = ", ".join(f"{key} {value}" for key, value in values.items() if key != TARGET)
    return f"{values[TARGET].rpartition('.')[2].removesuffix('Config')} ({own})"


def _scores(run: RunFolder) -> list[str]:
    rows = [_row(json.loads(path.read_bytes())) for path in sorted((run.path / "evals").glob("*.json"))]
    found = [row for row in rows if row is not None]
    if not found:
        return ["None yet: `python -m evals model=... task=...`, then export again."]
    return _table(("task", "metric", "score", "questions", "image"), found)


def _row(result: Mapping[str, Any]) -> tuple[str, ...] | None:
    # Predictions without published answers are no score, nor is a part of a task.
    if result["score"] is None or result["limit"] is not None:
        return None
    metric = result["metric"] + (f" ({result['variant']})" if "variant" in result else "")
    return result["task"], metric, f"{result['score']:.4f}", str(result["n_scored"]), result["condition"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def base_names(run: RunFolder) -> dict[str, str]:
    """Part -> the name that its base is found under."""
    model = run.read_config().model
    return {"vision_tower": model.vision, "language_model": model.language_model}


def trained_bases(run: RunFolder) -> list[str]:
    """The bases that the run has trained, and that are therefore no longer the ones of that name."""
    own = (Part.connector, Part.integration)
    return [part.value for part in run.read_config().stage.trains if part not in own]
