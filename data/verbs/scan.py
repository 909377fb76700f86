"""Reports every defect of data/verdicts.py: composes conf/scan.yaml, runs the data doctor and prints what it found."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from anchorformer.schema import parse
from data.folders import processor_folder
from data.mixture import open_sources
from data.overrides import CommandLine, options
from data.scan_config import ScanConfig
from data.usage import defaults, listed

COMMAND_LINE = CommandLine(command="python -m data scan", config="scan", schema=ScanConfig)


def main(arguments: Sequence[str]) -> int:
    """
    Raises:
        UserError: config that cannot be composed or parsed, and what `scan` raises.
    """
    config = compose_scan(arguments)
    folder = processor_folder(config)
    open_sources(config.whole)
    # Only now: everything above answers within a second, because none of it needs torch.
    from data.processor import open_processor
    from data.scan import samples, scan

    processor = open_processor(config, folder)
    report = scan(config, processor)
    for text in samples(config, processor):
        print(text)
    print(report.table())
    if report.bad_share > config.max_bad_share:
        print(f"more than max_bad_share={config.max_bad_share} is unusable", file=sys.stderr)
        return 1
    return 0


def compose_scan(overrides: Sequence[str]) -> ScanConfig:
    """The checked config from conf/scan.yaml and the command line.

    Raises:
        UserError: what `CommandLine` raises, or a value of the wrong type.
    """
    composed = COMMAND_LINE.compose(COMMAND_LINE.read(overrides))
    return parse(ScanConfig, composed, COMMAND_LINE.command, COMMAND_LINE.remedy)


def usage() -> str:
    """How the command is written, with the configs and keys that there are."""
    return f"""usage: python -m data scan data=<config> data.root=<folder> processor=<run or model folder> [key=value]

Reports every defect of data/verdicts.py: images that are missing, unreadable, mislabelled or oversized, records that
cannot be understood, <image> counts that do not match, samples without targets, over-length samples, duplicates; prints
samples with their supervised text in colour. Exits with 1 where more than max_bad_share of the records cannot be used
as they are, with 2 for a mistake in the command.

{listed("configs:", options("data"), ",")}
{listed("keys:", defaults(ScanConfig))}

processor= may also be a bare tokenizer's folder; then num_image_tokens and template (plain, v1, chat) are needed."""
