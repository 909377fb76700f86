"""Vision features on disk: what a frozen tower says of each tile, computed once and read by every run on those images.

A tile's entry is named by the sha256 of its pixels, as the tower would have read them: no change of an image, of the
transform or of the library behind it can bring up another tile's features. All entries of one tower, its weights, what
is tapped of it, precision and kind of device lie in one folder, `<root>/<hash of these>`; a sweep over anchors, depth
or connectors shares it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from anchorformer.configuration import AnchorFormerConfig
from anchorformer.contracts import VisionFeatures
from anchorformer.errors import UserError
from anchorformer.model_folder import read_index, read_manifest
from anchorformer.parts import parse_parts
from anchorformer.schema import TARGET, plugin_to_plain
from anchorformer.selectors.base import SelectorConfig

log = logging.getLogger(__name__)

FORMAT = 1
DESCRIPTION = "description.json"
CHECKSUM = "crc32"
HEADER_BYTES = 512
"""Room that an entry takes beside its tensors, at most."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One tensor of `VisionFeatures`, of a single tile."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Feature:
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """What every entry of one cache holds, by names of `VisionFeatures`."""

    features: dict[str, Feature]
    has_cls: bool

    @property
    def bytes(self) -> int:
        """Of one tile's tensors."""
        return sum(feature.bytes for feature in self.features.values())


class FeatureCache:
    """The entries of one tower; small, so that it can be handed to data workers.

    Attributes:
        folder: where they lie.
        model: the model folder whose tower they are of.
        is_ragged: whether the model's selector gives images different numbers of anchors; its choice is part of the
            entries then, and in their hash, in place of what it is made from.
    """

    def __init__(self, root: Path, model: Path, dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            root: of all caches; not made before something is written.
            dtype: that the tower computes in, and that its features are kept in.
            device: that the tower computes on; its kind decides how results are rounded.

        Raises:
            UserError: `model` is not a model folder.
        """
        self.model, self.dtype, self.device = model, dtype, device
        config = AnchorFormerConfig.from_pretrained(model)
        selector, _ = parse_parts(config.selector, config.connector)
        self.is_ragged, self._tiling = selector.ragged, config.tiling
        self._made_of = _made_of(model, config, selector, dtype, device)
        digest = hashlib.sha256(json.dumps(self._made_of, sort_keys=True).encode()).hexdigest()
        self.folder = root / digest[:16]
        self._layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        """What its entries hold.

        Raises:
            UserError: the cache has never been filled.
        """
        if self._layout is None:
            path = self.folder / DESCRIPTION
            if not path.is_file():
                raise UserError(
                    f"the feature cache {self.folder} is empty", found=f"no {DESCRIPTION}", expected="a filled cache",
                    remedy="start through `python -m train` or `python -m evals`, which fill it first",
                )  # fmt: skip
            described = json.loads(path.read_text())
            features = {
                name: Feature(tuple(value["shape"]), getattr(torch, value["dtype"]))
                for name, value in described["layout"].items()
            }
            self._layout = Layout(features, described["has_cls"])
        return self._layout

    def read(self, tiles_B3HW: Tensor) -> VisionFeatures:
        """The features of uint8 tiles, from memory-mapped files; of no tiles none, in their shapes.

        Raises:
            UserError: a tile has no entry, or a damaged one.
        """
        entries = [self._read_entry(self._path(key)) for key in keys_of(tiles_B3HW)]
        values: dict[str, Any] = {field.name: None for field in fields(VisionFeatures)}
        for name, feature in self.layout.features.items():
            rows = [entry[name] for entry in entries]
            values[name] = torch.stack(rows) if rows else torch.empty(0, *feature.shape, dtype=feature.dtype)
        chosen_BN = values["chosen_BN"]
        values["num_chosen"] = None if chosen_BN is None else tuple(chosen_BN.sum(1).tolist())
        return VisionFeatures(**values | {"has_cls": self.layout.has_cls})

    def num_chosen(self, key: str) -> int:
        """Tokens that a ragged selector has chosen of one tile; nothing else of its entry is read.

        Raises:
            UserError: it has no entry, or a damaged one.
        """
        return int(self._read_entry(self._path(key), "chosen_BN")["chosen_BN"].sum())

    def missing(self, keys: list[str]) -> list[int]:
        """Places of those keys that have no entry of the right size."""
        return [place for place, key in enumerate(keys) if not self._is_there(key)]

    def write(self, keys: list[str], features: VisionFeatures) -> None:
        """One entry per tile, each appearing whole; several processes may write the same ones at once.

        Raises:
            UserError: the disk is full.
        """
        tensors = {name: tensor.cpu() for name, tensor in _tensors(features).items()}
        for row, key in enumerate(keys):
            entry = {name: tensor[row].clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
            path = self._path(key)
            partial = path.with_name(f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(save(entry, metadata={CHECKSUM: _checksum(entry)}))
                partial.replace(path)
            except OSError as error:
                partial.unlink(missing_ok=True)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise self._no_room(str(error), "room for every entry") from None

    def describe(self, features: VisionFeatures) -> None:
        """Writes down what entries hold, once; the tower has said it of any tile."""
        layout = {
            name: {"shape": list(tensor.shape[1:]), "dtype": _name(tensor.dtype)}
            for name, tensor in _tensors(features).items()
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
        text = {"made_of": self._made_of, "layout": layout, "has_cls": features.has_cls}
        partial.write_text(json.dumps(text, indent=2) + "\n")
        partial.replace(self.folder / DESCRIPTION)

    def check_room(self, tiles: int) -> None:
        """Says how much may be written, before anything is.

        Raises:
            UserError: the disk has less, entries that are there counted as if they were of these tiles.
        """
        size = self.layout.bytes + HEADER_BYTES
        there = sum(1 for _ in self.folder.glob("??/*.safetensors"))
        free = shutil.disk_usage(self.folder).free
        log.info("feature cache %s: at most %s for %d tile(s); %d entries are there, %s free", self.folder,
                 _size(tiles * size), tiles, there, _size(free))  # fmt: skip
        if free < (tiles - there) * size:
            raise self._no_room(f"{_size(free)} free", f"{_size(tiles * size)} for {tiles} tiles; {there} are there")

    def counts_of(self, fingerprint: str) -> Path:
        """Where the numbers of chosen tokens of a source's images are kept (`data.counted`).

        Args:
            fingerprint: the source's.
        """
        digest = hashlib.sha256(json.dumps([fingerprint, self._tiling], sort_keys=True).encode()).hexdigest()
        return self.folder / f"complete-{digest[:16]}.npz"

    def _no_room(self, found: str, expected: str) -> UserError:
        return UserError(
            f"there is no room for the feature cache {self.folder}", found=found, expected=expected,
            remedy="free disk space, name another folder, or run the tower live with data.feature_cache=null",
        )  # fmt: skip

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _is_there(self, key: str) -> bool:
        try:
            return self._path(key).stat().st_size >= self.layout.bytes
        except FileNotFoundError:
            return False

    def _read_entry(self, path: Path, only: str | None = None) -> dict[str, Tensor]:
        """All of an entry, its checksum compared; or one of its tensors."""
        try:
            with safe_open(path, framework="pt") as file:
                if only is not None:
                    return {only: file.get_tensor(only)}
                entry: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                checksum = (file.metadata() or {}).get(CHECKSUM)
        except FileNotFoundError:
            raise UserError(
                "an image is not in the feature cache", found=f"no {path}", expected="an entry for every tile",
                remedy=f"the image has changed since the cache was filled, or the entry was deleted: remove "
                f"{self.folder}/complete-* and start again",
            ) from None  # fmt: skip
        except (OSError, SafetensorError) as error:
            raise self._damaged(path, str(error)) from None
        found = {name: Feature.of(tensor) for name, tensor in entry.items()}
        if found != self.layout.features or checksum != _checksum(entry):
            raise self._damaged(path, "another checksum" if found == self.layout.features else str(found))
        return entry

    def _damaged(self, path: Path, found: str) -> UserError:
        return UserError(
            f"the feature cache is damaged at {path}", found=found, expected="the entry as it was written",
            remedy=f"remove that file and {self.folder}/complete-*, and start again: what is missing is computed anew",
        )  # fmt: skip


def keys_of(tiles_B3HW: Tensor) -> list[str]:
    """The name of each tile's entry: the sha256 of its bytes and shape."""
    shape = str(tuple(tiles_B3HW.shape[1:])).encode()
    return [hashlib.sha256(shape + tile.numpy().tobytes()).hexdigest() for tile in tiles_B3HW.contiguous()]


def _made_of(
    model: Path, config: AnchorFormerConfig, selector: SelectorConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Everything but the image that decides a feature."""
    shards = {file for name, file in read_index(model).items() if name.startswith("vision_tower.")}
    manifest = read_manifest(model)
    vision = config.vision_config.to_dict()
    return {
        "format": FORMAT,
        "tower": sorted(manifest[name]["sha256"] for name in shards),
        "vision_config": {k: v for k, v in vision.items() if k not in ("transformers_version", "dtype")},
        "needs": asdict(selector.needs),
        "image_mean": config.image_mean,
        "image_std": config.image_std,
        "dtype": _name(dtype),
        "device": device.type,
        **({"selector": _rule(selector)} if selector.ragged else {}),
    }


def _rule(selector: SelectorConfig) -> dict[str, Any]:
    """What decides which tokens are chosen."""
    decides = {field.name for field in fields(selector) if field.compare}
    return {key: value for key, value in plugin_to_plain(selector).items() if key == TARGET or key in decides}


def _tensors(features: VisionFeatures) -> dict[str, Tensor]:
    values = {field.name: getattr(features, field.name) for field in fields(features)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checksum(entry: Mapping[str, Tensor]) -> str:
    checksum = 0
    for name in sorted(entry):
        checksum = zlib.crc32(entry[name].reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
