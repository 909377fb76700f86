"""Everything between a composed config and its ranks: inputs checked, start folder made, run folder written once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from anchorformer.errors import UserError
from anchorformer.schema import parse_plugin, plugin_to_plain, to_plain
from data.mixture import Mixture, open_sources
from train.choices import Part
from train.config import RunConfig
from train.observe.checks import check_shown
from train.plan.fit import settle
from train.run import environment
from train.run.folder import RunFolder
from train.run.identity import differences, numbers
from train.run.lock import acquired
from train.start import check_devices
from train.start_folder import make_start_folder, manifest_hash, resolve_model


def prepare(config: RunConfig, command: Sequence[str], *, starts_here: bool = True) -> RunFolder:
    """Checks what the config names, cheapest first, then makes the start folder and the run folder.

    Args:
        command: what the user typed, for environment.json.
        starts_here: whether this machine is the one whose devices the ranks will need.

    Returns:
        the run folder, ready for `train.start`, and held by this process (`train.run.lock`).

    Raises:
        UserError: a file or folder missing or not in its format, parts of the model that do not fit each other, a start
            folder that is damaged or of another shape, a run folder that exists already, or a stored config that
            differs from this one where the run is resumed; fewer CUDA devices than ranks; a card too small.
    """
    folder = run_folder(config)
    check_files(config)
    check_shown(config)
    if starts_here:
        check_devices(config)
    config = settle(check_parts(config))
    is_new = not folder.config.is_file()
    if is_new:
        start = make_start_folder(config)
        _check_adapter(config, start)
        if _is_ragged(config):  # how long samples are is known once their images were looked at
            _fill_cache(config, start)
            check_samples(config, start)
        else:
            check_samples(config, start)
            _fill_cache(config, start)
        _create(folder.path, config.resume != "never")
    with acquired(folder.path):
        if is_new:
            texts = {"start.txt": f"{start}\n{manifest_hash(start)}\n"}
        else:
            texts = {}
            folder.check_seal()
            _compare(config, folder.read_config(), folder.config)
            _compare_start(folder)
            _fill_cache(config, folder.start)
            _fit_checkpoint(config, folder)
            folder.forget_last_end()
        texts[folder.environment.name] = json.dumps(_environment(folder, command), indent=2) + "\n"
        # Last the config: a folder that has one is one that ranks can be started on.
        texts["config.yaml"] = yaml.safe_dump(to_plain(config), sort_keys=False)
        folder.write_sealed(texts)
    return folder


def run_folder(config: RunConfig) -> RunFolder:
    """Where this run lives.

    Raises:
        UserError: a name that leads out of `output_root`, or a run that exists while it is not to be resumed.
    """
    root = Path(config.output_root)
    folder = root / config.run
    if Path(config.run).is_absolute() or ".." in Path(config.run).parts or folder == root:
        raise UserError(
            "the run's name leads out of output_root", found=f"run={config.run}", expected="a name such as first/align",
            remedy="set output_root=... for another place",
        )  # fmt: skip
    if folder.exists() and config.resume == "never":
        raise UserError(
            f"the run {config.run} exists already", found=folder, expected="a folder that does not exist",
            remedy="choose another run=..., or continue this one with resume=auto",
        )  # fmt: skip
    return RunFolder(folder)


def is_done(config: RunConfig) -> bool:
    """Whether a run that may be resumed has nothing left to do.

    Raises:
        UserError: it was done with another config, or started from a model that has been replaced since; what it left
            is then not what this command asks for.
    """
    if config.resume == "never":
        return False
    folder = run_folder(config)
    if not folder.done.exists():
        return False
    _compare(check_parts(config), folder.read_config(), folder.config)
    _compare_start(folder)
    return True


def check_files(config: RunConfig) -> None:
    """Opens what the config names on disk; the sources' annotations are parsed here once, for all ranks."""
    if config.init_from:
        resolve_model(config.init_from, Path(config.output_root))
    if config.resume not in ("never", "auto") and not Path(config.resume).is_dir():
        raise UserError(
            "resume names no checkpoint", found=f"resume={config.resume}",
            expected="never, auto, or a folder under <run>/state/", remedy="use resume=auto for the newest one",
        )  # fmt: skip
    open_sources(config.data)


def check_parts(config: RunConfig) -> RunConfig:
    """Parses the model's plug-ins; returns the config with every one of their values written out."""
    from anchorformer.connectors.base import PACKAGE as CONNECTORS
    from anchorformer.connectors.base import ConnectorConfig
    from anchorformer.integrations.base import PACKAGE as INTEGRATIONS
    from anchorformer.integrations.base import IntegrationConfig
    from anchorformer.selectors.base import PACKAGE as SELECTORS
    from anchorformer.selectors.base import SelectorConfig

    selector = parse_plugin(SelectorConfig, config.model.selector, SELECTORS, "model.selector")
    connector = parse_plugin(ConnectorConfig, config.model.connector, CONNECTORS, "model.connector")
    if selector.ragged:
        _check_looked_first(config)
    model = replace(config.model, selector=plugin_to_plain(selector), connector=plugin_to_plain(connector))
    if model.integration is not None:
        integration = parse_plugin(IntegrationConfig, model.integration, INTEGRATIONS, "model.integration")
        model = replace(model, integration=plugin_to_plain(integration))
    return replace(config, model=model)


def _check_looked_first(config: RunConfig) -> None:
    """Where images have different numbers of anchors, they are looked at before the run, by a tower that stays."""
    if Part.vision_tower in config.stage.trains:
        raise UserError(
            "a selector whose number of anchors depends on the image needs a frozen vision tower",
            found="stage.trains with vision_tower", expected="a tower that says the same of an image in every step",
            remedy="train other parts, or choose a selector with num_anchors",
        )  # fmt: skip
    if config.data.feature_cache is None:
        from data.counted import needs_cache  # imports torch

        raise needs_cache()


def check_samples(config: RunConfig, start: Path) -> None:
    """Measures every sample with the run's own processor, once for all ranks, which find the counts in the cache.

    Raises:
        UserError: a template that does not fit the tokenizer, what the over-length rule refuses, and a profile of steps
            that the run does not have.
    """
    from transformers import AutoProcessor

    import anchorformer.auto  # noqa: F401 (makes the processor known to transformers)
    from data.loader import num_steps  # imports torch
    from train.features import own_cache

    processor = AutoProcessor.from_pretrained(start, local_files_only=True)
    features = own_cache(config, start) if processor.needs_token_counts else None
    mixture = Mixture(config.data, processor.with_template(config.stage.template), features)
    if config.profiled is not None:
        config.profiled.check(num_steps(config.stage, len(mixture)))


def _is_ragged(config: RunConfig) -> bool:
    """Whether images have different numbers of anchors."""
    from anchorformer.selectors.base import PACKAGE, SelectorConfig  # imports torch

    return parse_plugin(SelectorConfig, config.model.selector, PACKAGE, "model.selector").ragged


def _environment(folder: RunFolder, command: Sequence[str]) -> dict[str, Any]:
    """The facts of this attempt, and of those before it."""
    earlier = json.loads(folder.environment.read_text()) if folder.environment.is_file() else None
    before = [] if earlier is None else [*earlier.pop("before"), earlier]
    return {**environment.facts(command), "before": before}


def _check_adapter(config: RunConfig, start: Path) -> None:
    if config.stage.lora is not None:
        from train.lora import check_adapter  # imports torch

        check_adapter(config, start)


def _fill_cache(config: RunConfig, start: Path) -> None:
    """What the ranks will read in place of running the tower, where there is to be such a thing."""
    if config.data.feature_cache is not None:
        from train.features import fill_cache  # imports torch

        fill_cache(config, start)


def _fit_checkpoint(config: RunConfig, folder: RunFolder) -> None:
    """Converts the checkpoint that will be resumed from, where it was written by another number of ranks."""
    from train.checkpoint import fit  # imports torch

    if config.resume != "never":
        fit(folder.state, config)


def _compare(config: RunConfig, before: RunConfig, path: Path) -> None:
    found = [f"{key} (was {was}, now {now})" for key, was, now in differences(numbers(before), numbers(config))]
    if found:
        raise UserError(
            f"the run {config.run} was started with another config", found="; ".join(found), expected=f"as in {path}",
            remedy="resume with the same values, or start another run",
        )  # fmt: skip


def _compare_start(folder: RunFolder) -> None:
    found, expected = manifest_hash(folder.start), folder.start_hash
    if found != expected:
        raise UserError(
            f"the model that {folder.path} started from has been replaced", found=f"{folder.start} ({found[:12]})",
            expected=f"the one of its start ({expected[:12]})", remedy="start another run from the new model",
        )  # fmt: skip


def _create(folder: Path, resumed: bool) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A run to be resumed may have been stopped before it wrote its config.
        folder.mkdir(exist_ok=resumed)
    except FileExistsError:
        raise UserError(
            f"the run folder {folder} has appeared meanwhile", found="another launch of the same run",
            expected="one launch per run", remedy="choose another run=...",
        ) from None  # fmt: skip
    except OSError as error:
        raise UserError(
            f"the run folder {folder} cannot be made", found=str(error), expected="a place that can be written to",
            remedy="set output_root=... to one",
        ) from None  # fmt: skip
