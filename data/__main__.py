"""`python -m data scan`: composes conf/scan.yaml, runs the data doctor and prints what it found."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import AutoTokenizer

from anchorformer.errors import UserError, run_guarded
from anchorformer.images import ImageTransform
from anchorformer.processing import AnchorFormerProcessor
from anchorformer.schema import parse
from data.scan import ScanConfig, samples, scan

CONF = Path(__file__).resolve().parent.parent / "conf"

USAGE = """usage: python -m data scan data=<name of conf/data> data.root=<folder> processor=<model or tokenizer folder>
           [template=plain|v1|chat] [num_image_tokens=T] [data.max_length=...] [max_bad_share=0] [out=findings.jsonl]

Reports missing, unreadable, mislabelled and oversized images, <image> counts that do not match, samples without
targets, over-length samples and duplicates; prints three samples with their supervised text in colour. Exits with 1
where more than max_bad_share of the records cannot be used as they are, with 2 for a mistake in the command."""


def main(arguments: Sequence[str]) -> int:
    """Runs the verb that the first argument names.

    Raises:
        UserError: unknown verb, config that cannot be composed or parsed, and what `scan` raises.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    verb, *overrides = arguments
    if verb != "scan":
        raise UserError(
            f"unknown verb '{verb}'", found=" ".join(arguments), expected="scan", remedy="python -m data --help"
        )
    config = compose_scan(overrides)
    processor = open_processor(config)
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
        UserError: an override that cannot be read, a group or key that does not exist, a value missing or of the wrong
            type.
    """
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            composed = compose("scan", overrides=[_settable(override) for override in overrides])
        missing = sorted(OmegaConf.missing_keys(composed))
        plain = None if missing else OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(
            "the config cannot be composed",
            found=" / ".join(str(error).splitlines()[:2]),
            expected="data=" + "|".join(sorted(path.stem for path in (CONF / "data").glob("*.yaml"))),
            remedy="python -m data --help",
        ) from None
    if missing:
        raise UserError(
            f"{len(missing)} value(s) are missing",
            found=", ".join(f"{key}=???" for key in missing),
            expected="a value for each of them",
            remedy="add " + " ".join(f"{key}=..." for key in missing),
        )
    assert isinstance(plain, dict)
    return parse(ScanConfig, {str(key): value for key, value in plain.items()}, "scan")


def open_processor(config: ScanConfig) -> AnchorFormerProcessor:
    """The processor of a model folder, or one around a bare tokenizer.

    Raises:
        UserError: no such folder, no tokenizer in it, a bare tokenizer without `num_image_tokens` and `template`, or
            a template that does not fit.
    """
    folder = Path(config.processor)
    if not folder.is_dir():
        raise UserError(
            "processor is no folder",
            found=config.processor,
            expected="a model folder or a tokenizer's folder",
            remedy="e.g. processor=checkpoints/<run>/model",
        )
    if (folder / "processor_config.json").is_file():
        processor = AnchorFormerProcessor.from_pretrained(folder, local_files_only=True)
        return processor.with_template(config.template) if config.template else processor
    if config.num_image_tokens is None or config.template is None:
        raise UserError(
            "the processor's folder holds no processor_config.json",
            found=f"num_image_tokens={config.num_image_tokens}, template={config.template}",
            expected="both of them, with a bare tokenizer",
            remedy="add num_image_tokens=145 template=v1, or name a model folder",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            "there is no tokenizer",
            found=f"{folder}: {str(error).splitlines()[0]}",
            expected="tokenizer.json or tokenizer.model with their configs",
            remedy="name a model or tokenizer folder",
        ) from None
    # Pixels are not looked at here, so the size of the tiles does not matter.
    transform = ImageTransform(image_size=32, fill_rgb=(0, 0, 0))
    return AnchorFormerProcessor(transform, tokenizer, config.num_image_tokens, template=config.template)


def _settable(override: str) -> str:
    # A key of the config classes can be set whether the YAML mentions it or not; unknown ones are refused by `parse`.
    return f"++{override}" if override.startswith("data.") else override


if __name__ == "__main__":
    run_guarded(lambda: main(sys.argv[1:]))
