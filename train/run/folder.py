"""What lies where in a run's folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from anchorformer.errors import UserError
from anchorformer.schema import parse
from train.config import RunConfig

ABSENT = "absent"
"""Among the hashes of a sealed file: it is about to be written for the first time, and may not be there yet."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run; `checkpoints/README.md` describes them to users."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, all that ranks ever see."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Where each launch came from, as JSON: the newest one, and under `before` those that came before it."""
        return self.path / "environment.json"

    @property
    def launch(self) -> int:
        """How often the run has been launched, whatever torchrun has started again since; 0 for a replay."""
        return 1 + len(json.loads(self.environment.read_bytes())["before"]) if self.environment.is_file() else 0

    @property
    def communication(self) -> Path:
        """What the ranks have talked over at each of their starts, as JSON, like `environment`."""
        return self.path / "communication.json"

    @property
    def identity(self) -> Path:
        """What the run's numbers depend on, by hash, as JSON; written before the first step."""
        return self.path / "identity.json"

    @property
    def seal(self) -> Path:
        """Hashes of the files that the run is known by: config, environment, start, identity."""
        return self.path / "SEAL.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per optimizer step, written by rank 0."""
        return self.path / "metrics.jsonl"

    @property
    def health(self) -> Path:
        """How the anchors looked at the fixed images, one JSON object per look; `media` has the images."""
        return self.path / "health.jsonl"

    @property
    def evals(self) -> Path:
        """Losses and scores while training, one JSON object per validation and task."""
        return self.path / "evals.jsonl"

    @property
    def media(self) -> Path:
        """Overlays of the anchors and answers.json, in one folder for each look."""
        return self.path / "media"

    @property
    def tracker(self) -> Path:
        """What trackers keep with the run: the ids under which they show it, and offline files."""
        return self.path / "tracker"

    @property
    def tracker_ids(self) -> dict[str, str]:
        """Tracker -> the id under which it knows the run, of those that have shown it."""
        found = {}
        for path in sorted(self.tracker.glob("*.json")):
            try:
                found[path.stem] = str(json.loads(path.read_bytes())["id"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # a tracker's own files never keep a run from saving
        return found

    def restore_tracker_ids(self, known: Mapping[str, str]) -> None:
        """Writes the ids of trackers down whose own notes are gone, so that the run goes on in the same curves."""
        for name in known.keys() - self.tracker_ids.keys():
            self.tracker.mkdir(exist_ok=True)
            write_atomically(self.tracker / f"{name}.json", json.dumps({"id": known[name]}) + "\n")

    @property
    def state(self) -> Path:
        """Checkpoints to resume from."""
        return self.path / "state"

    @property
    def model(self) -> Path:
        """The trained model as a Hugging Face folder, once the run is done."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """What a run with `stage.lora` has learnt, in PEFT's format, once the run is done; `model` has it merged."""
        return self.path / "adapter"

    @property
    def done(self) -> Path:
        """Exists when the run is complete."""
        return self.path / "DONE"

    @property
    def halted(self) -> Path:
        """Why the run stopped, as JSON with `exit_code` and `message`; torchrun's own exit code does not tell."""
        return self.path / "HALTED.json"

    @property
    def interrupted(self) -> Path:
        """Exists when a signal stopped the run and its state is saved; removed when the run is resumed."""
        return self.path / "INTERRUPTED"

    @property
    def rehearsal(self) -> Path:
        """Exists in the folder of a rehearsal only, whose last rank is killed behind the first checkpoint."""
        return self.path / "REHEARSAL"

    @property
    def black_boxes(self) -> Path:
        """Where each rank leaves what it was at: `now_<r>.json` as long as it lives, `rank_<r>.json` when it fails."""
        return self.path / "black_box"

    def log(self, rank: int) -> Path:
        return self.path / "logs" / f"rank_{rank}.log"

    def nccl_log(self, rank: int) -> Path:
        """What NCCL itself has to say, where NCCL_DEBUG asks for it."""
        return self.path / "logs" / f"nccl_rank_{rank}.log"

    def trace(self, first: int, last: int, rank: int) -> Path:
        """What a rank did in the steps from `first` to `last`, as Chrome's trace format under gzip."""
        return self.path / "profile" / f"step-{first:08d}-{last:08d}" / f"rank_{rank}.json.gz"

    @property
    def start(self) -> Path:
        """The model folder that every rank loads: `start/` here, or the folder that `start.txt` names.

        Raises:
            UserError: neither is there.
        """
        pointer = self.path / "start.txt"
        if pointer.is_file() and pointer.stat().st_size:
            return Path(pointer.read_text().splitlines()[0])
        if not (self.path / "start").is_dir():
            raise UserError(
                f"run {self.path} has nothing to start from",
                found="an empty start.txt" if pointer.is_file() else "neither start/ nor start.txt",
                expected="a model folder prepared before the ranks were started",
                remedy="start the run with `python -m train`",
            )  # fmt: skip
        return self.path / "start"

    @property
    def start_hash(self) -> str:
        """sha256 of the start folder's manifest when the run was prepared, from the second line of `start.txt`."""
        lines = (self.path / "start.txt").read_text().splitlines()
        return lines[1] if len(lines) > 1 else "not written down"

    def read_config(self) -> RunConfig:
        """The run's configuration.

        Raises:
            UserError: the file is missing or does not fit.
        """
        if not self.config.is_file():
            raise UserError(
                f"{self.path} is not a run folder", found="no config.yaml",
                expected="a folder made by `python -m train`", remedy="start the run with `python -m train`",
            )  # fmt: skip
        try:
            values = yaml.safe_load(self.config.read_bytes())
        except yaml.YAMLError as error:
            raise UserError(
                f"{self.config} cannot be read", found=" ".join(str(error).split())[:300],
                expected="the YAML that the run was started with",
                remedy="restore the file; a run's values are changed on its command line, not in its folder",
            ) from None  # fmt: skip
        return parse(RunConfig, values, str(self.config))

    def write_sealed(self, texts: Mapping[str, str]) -> None:
        """Writes files whose contents `check_seal` will ask for; a kill at any moment leaves a folder that passes.

        Args:
            texts: file name -> contents; other sealed files stay as they are.
        """
        sealed = self._sealed()
        new = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        # Both contents are right until the last file is written, and so is no file where there was none.
        self._write_seal(sealed | {name: [*sealed.get(name, [ABSENT]), digest] for name, digest in new.items()})
        for name, text in texts.items():
            write_atomically(self.path / name, text)
        self._write_seal(sealed | {name: [digest] for name, digest in new.items()})

    def check_seal(self) -> None:
        """Compares the files that a run is known by with what it wrote.

        Raises:
            UserError: one is gone or has been changed; all of them are named.
        """
        found = self.broken_seals()
        if found:
            raise UserError(
                f"the run folder {self.path} is not as the run left it", found="; ".join(found),
                expected=f"the files as {self.seal.name} lists them",
                remedy="restore them; a run's values are changed on its command line, not in its folder",
            )  # fmt: skip

    def broken_seals(self) -> list[str]:
        """What is wrong with the sealed files, one line for each."""
        if not self.seal.is_file():
            return [f"{self.seal.name} is missing"]
        found = []
        for name, digests in sorted(self._sealed().items()):
            path = self.path / name
            if not path.is_file():
                if ABSENT not in digests:
                    found.append(f"{name} is missing")
            elif hashlib.sha256(path.read_bytes()).hexdigest() not in digests:
                found.append(f"{name} has been changed")
        return found

    def _sealed(self) -> dict[str, list[str]]:
        if not self.seal.is_file():
            return {}
        try:
            return {str(name): list(digests) for name, digests in json.loads(self.seal.read_bytes()).items()}
        except (ValueError, AttributeError, TypeError):
            raise UserError(
                f"{self.seal} cannot be read", found="no list of hashes", expected="the file as the run left it",
                remedy="restore it, or start a new run with init_from",
            ) from None  # fmt: skip

    def _write_seal(self, sealed: Mapping[str, Sequence[str]]) -> None:
        write_atomically(self.seal, json.dumps(sealed, indent=2, sort_keys=True) + "\n")

    def forget_last_end(self) -> None:
        """Removes or sets aside what the last attempt ended with; it says nothing about the next one."""
        for path in (self.halted, self.interrupted):
            path.unlink(missing_ok=True)
        # Of all ranks, also those that the next attempt does not have.
        for path in [path for kind in ("rank", "now") for path in self.black_boxes.glob(f"{kind}_*.json")]:
            path.replace(path.with_name(f"before_{path.name}"))

    def write_halted(self, exit_code: int, message: str) -> None:
        """Leaves the reason for whoever started the ranks; the first one to write is the one that is kept."""
        if not self.halted.exists():
            write_atomically(self.halted, json.dumps({"exit_code": exit_code, "message": message}) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that its name shows either the old content or the new, also after a power cut."""
    partial = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # a full disk is not made fuller
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
