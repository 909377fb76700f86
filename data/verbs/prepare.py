"""Brings data to where training reads it: `prepare NAME` fetches a published data set, `prepare shard` cuts a copy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from anchorformer.errors import UserError
from anchorformer.schema import parse
from data.disk import size
from data.overrides import CommandLine, options
from data.prepare.config import GROUP, PrepareConfig, catalogue
from data.shards.config import ShardConfig
from data.usage import defaults, listed

SHARD = "shard"

LINE = CommandLine(
    command="python -m data prepare", config=GROUP, schema=PrepareConfig,
    remedies={GROUP: "a data set of your own is one YAML in conf/prepare"},
)  # fmt: skip

SHARD_LINE = CommandLine(command=f"python -m data prepare {SHARD}", config="shard", schema=ShardConfig)


def main(arguments: Sequence[str]) -> int:
    """
    Raises:
        UserError: nothing named, a config that cannot be composed or parsed, and what the work itself raises.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not arguments or "=" in arguments[0]:
        raise UserError(
            "prepare what?", found=" ".join(arguments) or "nothing named",
            expected=f"{SHARD}, or one of {', '.join(catalogue())}", remedy="python -m data prepare --help",
        )  # fmt: skip
    name, *overrides = arguments
    return shard(overrides) if name == SHARD else published(name, overrides)


def published(name: str, overrides: Sequence[str]) -> int:
    """Fetches and verifies a published data set."""
    composed = LINE.compose(LINE.read([f"{GROUP}={name}", *overrides]))
    config = parse(PrepareConfig, composed, LINE.command, LINE.remedy)
    from data.prepare.run import prepare

    prepare(name, config)
    return 0


def shard(overrides: Sequence[str]) -> int:
    """Writes a sharded copy, or compares a finished one with its manifest."""
    config = parse(ShardConfig, SHARD_LINE.compose(SHARD_LINE.read(overrides)), SHARD_LINE.command, SHARD_LINE.remedy)
    from data.shards.verify import verify  # these two import torch
    from data.shards.write import write

    out = Path(config.out)
    if config.verify:
        verify(out)
        print(f"{out}: every file is what was written")
        return 0
    for name, facts in write(config).sources.items():
        total = sum(item.bytes for item in facts.shards)
        missing = f", {facts.num_missing} of them missing" if facts.num_missing else ""
        print(f"{name}: {facts.num_records} records, {facts.num_images} images{missing}, {len(facts.shards)} shards, "
              f"{size(total)}")  # fmt: skip
    print(f"read it with data.shards={out}, or the URL that you copy the folder to")
    return 0


def usage() -> str:
    """How the command is written."""
    return f"""usage: python -m data prepare <name> root=<folder> [key=value]
       python -m data prepare {SHARD} data=<config> data.root=<folder> out=<folder> [key=value]

With a name: says size, licence and room, then fetches that published data set and what it needs below root (which
training knows as data.root), unpacks it, and proves that counts agree and every image is there. Called again, it goes
on. Another address: prepare.files.<file>.url=..., or mirror=<folder or URL> with <name>/<file> in it.

{listed("names:", catalogue(), ",")}
{listed("keys:", defaults(PrepareConfig))}

With {SHARD}: copies the published files of a mixture into shards of bounded size that can be read from any disk or URL
with data.shards=<folder or URL>: the same records, ids and order of samples. Called again, it goes on; verify=true
compares a finished copy with its manifest.

{listed("configs:", options("data"), ",")}
{listed("keys:", defaults(ShardConfig))}"""
