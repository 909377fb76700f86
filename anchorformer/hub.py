"""The door to folders that others wrote: what cannot be loaded is named, by its file where it is one."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.activations import ACT2FN

from anchorformer.errors import UserError

T = TypeVar("T")

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
INDEX = "model.safetensors.index.json"
DESCRIPTIONS = (
    CONFIG, "generation_config.json", "preprocessor_config.json", "processor_config.json", TOKENIZER_CONFIG, TOKENIZER,
    INDEX,
)  # fmt: skip
"""Files of a Hugging Face folder that hold one JSON object each; what is behind them takes that for granted."""

SIZES = (
    "hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "patch_size", "vocab_size",
)  # fmt: skip
"""Values of config.json that models divide by and count with."""


def load(role: str, name: str | Path, loader: Callable[..., T], **options: Any) -> T:
    """What one of transformers' loaders makes of a hub id or a folder; never with code from there.

    Args:
        role: what is loaded, for the message.
        options: of the loader.

    Raises:
        UserError: no such folder, a file in it that is not what its name says, or what the loader has against it.
    """
    name = str(name)
    is_path = name.startswith(("/", ".", "~"))
    try:
        if Path(name).is_dir():
            check_files(Path(name))
        elif is_path:
            raise FileNotFoundError("no such folder")
        return loader(name, trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise UserError(
            f"the {role} cannot be loaded", found=f"{name}: {' '.join(str(error).split())[:300]}",
            expected="a complete Hugging Face folder" if is_path else "a hub id that can be reached, or a folder",
            remedy="check the path; a clone without git-lfs holds pointers instead of weights" if is_path
            else "check the name, or download it first and give the folder",
        ) from None  # fmt: skip


def check_complete(role: str, name: str | Path, wanted: Collection[str], report: Mapping[str, Any]) -> None:
    """Refuses weights that transformers would have filled up with random ones.

    Args:
        wanted: names of the tensors that are used.
        report: what a loader returns for `output_loading_info=True`, called with `ignore_mismatched_sizes=True`.

    Raises:
        UserError: naming tensors that are missing, or have another shape than the configuration gives them.
    """
    missing = sorted({*report["missing_keys"]} & {*wanted})
    mismatched = sorted({str(entry[0]) for entry in report["mismatched_keys"]} & {*wanted})
    if missing or mismatched:
        raise UserError(
            f"{name}: the {role}'s weights are incomplete",
            found=f"{len(missing)} missing {missing[:3]}, {len(mismatched)} of another shape {mismatched[:3]}",
            expected=f"all {len(wanted)} tensors that its config.json describes",
            remedy="download it again; config.json and weights must come from one model",
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        UserError: it holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # also bytes that are no text
        raise _damaged(path, str(error), "JSON") from None
    if not isinstance(content, dict):
        raise _damaged(path, json.dumps(content)[:60], "a JSON object")
    return content


def read_mapping(path: Path, key: str) -> dict[str, Any]:
    """The mapping under `key` of the JSON object that a file holds.

    Raises:
        UserError: it holds none.
    """
    value = read_object(path).get(key)
    if not isinstance(value, dict):
        raise _damaged(path, f"{key}: {json.dumps(value)[:60]}", f"an object under {key}")
    return value


def read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file name, as the index of a folder has it.

    Raises:
        UserError: the index is damaged, or names shards that are not there.
    """
    weight_map = read_mapping(folder / INDEX, "weight_map")
    missing = sorted({str(name) for name in weight_map.values()} - {path.name for path in folder.iterdir()})
    if missing:
        raise _damaged(folder / INDEX, f"names {', '.join(missing[:3])} ({len(missing)} missing)", "files beside it")
    return weight_map


def check_files(folder: Path) -> None:
    """Looks for values in a Hugging Face folder that what is behind them trips over without saying where they stand.

    Raises:
        UserError: naming the file, and the value where it is one.
    """
    for name in DESCRIPTIONS:
        if (folder / name).is_file():
            read_object(folder / name)
    if (folder / CONFIG).is_file():
        _check_config(folder / CONFIG)
    if (folder / TOKENIZER_CONFIG).is_file():
        _check_tokenizer_config(folder / TOKENIZER_CONFIG)
    if (folder / INDEX).is_file():
        read_weight_map(folder)
    if (folder / TOKENIZER).is_file():
        _check_tokenizer(folder / TOKENIZER)


def _check_config(path: Path) -> None:
    content = read_object(path)
    values = dict(content)
    for part in ("vision_config", "text_config"):
        inner = content.get(part)
        values |= {f"{part}.{key}": value for key, value in (inner if isinstance(inner, dict) else {}).items()}
    for name, value in values.items():
        key = name.rpartition(".")[2]
        if key in SIZES and isinstance(value, int) and value < 1:
            raise _damaged(path, f"{name}: {value}", "1 or more")
        if key == "hidden_act" and (not isinstance(value, str) or value not in ACT2FN):
            raise _damaged(path, f"{name}: {json.dumps(value)[:60]}", "an activation that transformers knows")


def _check_tokenizer_config(path: Path) -> None:
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), (str, dict))
    allowed = {**tokens, "tokenizer_class": (str,)}
    for key, value in read_object(path).items():
        if value is not None and key in allowed and not isinstance(value, allowed[key]):
            raise _damaged(path, f"{key}: {json.dumps(value)[:60]}", "text")


def _check_tokenizer(path: Path) -> None:
    lacking = {"model", "added_tokens"} - read_object(path).keys()
    if lacking:
        raise _damaged(path, f"no {' and no '.join(sorted(lacking))}", "a fast tokenizer's file")
    try:
        tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises nothing narrower)
        raise _damaged(path, str(error), "a fast tokenizer's file") from None


def _damaged(path: Path, found: str, expected: str) -> UserError:
    return UserError(
        f"{path} cannot be read", found=found, expected=expected,
        remedy="restore the file, or copy it again from the published model",
    )  # fmt: skip
