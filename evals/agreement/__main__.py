"""`python -m evals.agreement model=... data=...`: composes a comparison of selectors, runs it, writes what it found."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorformer.errors import run_guarded
from anchorformer.schema import parse
from data.folders import model_folder
from data.mixture import open_sources
from data.overrides import CommandLine, check_option, options
from data.usage import HELP, defaults, listed
from evals.agreement.config import AgreementConfig, choosing

if TYPE_CHECKING:
    from evals.agreement.overlaps import Overlap

COMMAND_LINE = CommandLine(command="python -m evals.agreement", config="agreement", schema=AgreementConfig)
OUT = "agreement"


def compose_config(overrides: Sequence[str]) -> AgreementConfig:
    """The command line as a checked config.

    Raises:
        UserError: what `CommandLine` raises, a value of the wrong type, or a selector that conf/selector does not have
            or that chooses no number of patches.
    """
    composed = COMMAND_LINE.compose(COMMAND_LINE.read(overrides))
    config = parse(AgreementConfig, composed, COMMAND_LINE.command, COMMAND_LINE.remedy)
    for name in config.selectors:
        check_option("selector", name, list(choosing()), "name files of conf/selector that have num_anchors")
    return config


def usage() -> str:
    """How the command is written, with the configs and keys that there are."""
    return f"""usage: python -m evals.agreement model=<run or model folder> data=<config> data.root=<folder> [key=value]

Compares which patches selectors choose, and which ones a selector chooses in different layers, on the same images:
the share that two of them have in common, and their Jaccard index, as agreement.md and agreement.json.

{listed("configs:", options("data"), ",")}
{listed("rules:", choosing(), ",")}
{listed("keys:", defaults(AgreementConfig))}"""


def main() -> int:
    if len(sys.argv) == 1 or not set(HELP).isdisjoint(sys.argv):
        print(usage())
        return 0
    config = compose_config(sys.argv[1:])
    folder = model_folder(config.model, "model", "config.json")
    sources = [source for source, _ in open_sources(config.data)]
    # Only now: everything above answers within a second, because none of it needs torch.
    from evals.agreement.overlaps import between_layers, between_selectors, spread
    from evals.agreement.rules import open_eye, rules

    eye, own = open_eye(folder)
    selectors, left_out = rules(config, eye, own)
    layers = range(max(1, eye.tower.num_layers - config.layers + 1), eye.tower.num_layers + 1)
    images = spread(sources, config.images)
    first = next(iter(selectors.values()))
    facts: dict[str, Any] = {
        "model": str(folder), "images": len(images), "layer": first.layer, "patches": eye.count(first),
        "of_patches": eye.tower.num_tokens - eye.tower.has_cls, "rule_of_layers": next(iter(selectors)),
        "left_out": left_out, "is_tiled": eye.is_tiled,
    }  # fmt: skip
    overlaps = {
        "selectors": between_selectors(eye, selectors, images, config.batch_size),
        "layers": between_layers(eye, first, layers, images, config.batch_size),
    }
    out = Path(config.out) if config.out else Path(config.model) / OUT
    out.mkdir(parents=True, exist_ok=True)
    found = {**facts, **{name: dataclasses.asdict(overlap) for name, overlap in overlaps.items()}}
    (out / "agreement.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    text = markdown(facts, overlaps["selectors"], overlaps["layers"])
    (out / "agreement.md").write_text(text, "utf-8")
    print(text)
    return 0


def markdown(facts: dict[str, Any], selectors: Overlap, layers: Overlap) -> str:
    """The report as Markdown."""
    lines = [
        f"# Agreement of selectors on {facts['images']} images\n",
        f"`{facts['model']}`: each chooses {facts['patches']} of {facts['of_patches']} patches, [CLS] not counted. Two "
        f"that have nothing to do with each other share {facts['patches'] / facts['of_patches']:.3f} on average.\n",
        *["The model cuts images into tiles; here each is seen as one padded square.\n"] * facts["is_tiled"],
        f"## Between selectors, layer {facts['layer']}\n",
        *(f"`{name}` is left out: {why}.\n" for name, why in facts["left_out"].items()),
        *_tables(selectors),
        f"## Between layers, `{facts['rule_of_layers']}`\n",
        "Layers are counted as Hugging Face counts hidden states: 1 is the output of the first block.\n",
        *_tables(layers),
    ]
    return "\n".join(lines)


def _tables(overlap: Overlap) -> list[str]:
    blocks = []
    for title, rows in (("Share in common", overlap.share), ("Jaccard index", overlap.jaccard)):
        head = f"| {title} | {' | '.join(overlap.names)} |\n|---|{'---:|' * len(overlap.names)}\n"
        body = (f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} |\n" for name, row in zip(
            overlap.names, rows, strict=True))  # fmt: skip
        blocks.append(head + "".join(body))
    return blocks


if __name__ == "__main__":
    run_guarded(main)
