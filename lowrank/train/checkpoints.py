"""A folder of checkpoints: each is written whole or not at all and checked when read; the last few stay.

    folder/step-00000040/manifest.json     what the others must be: sizes and hashes
    folder/step-00000040/process-0.pt      what that process needs to go on, by torch.save

Reading executes nothing of a file (``torch.load(weights_only=True)``). It does not know what is saved.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lowrank.files import AdapterError, make_folder, read_json, sync
from lowrank.notices import LowrankWarning

FORMAT = "lowrank training checkpoint, version 1"
MANIFEST = "manifest.json"
WHOLE = re.compile(r"step-(\d{8,})")
PARTIAL = re.compile(r"\.step-\d{8,}\.[0-9a-f]{16}")  # what a crash may leave


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read, or continued from."""


class DamagedCheckpointWarning(LowrankWarning):
    """A checkpoint is damaged, and the one before it is used."""


class Checkpoints:
    """The checkpoints in ``folder``, of which the last ``keep`` are kept.

    Only what this class wrote is ever deleted. Making it makes the folder, and raises CheckpointError where
    nothing can be written into it.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep
        try:
            make_folder(self.folder)
            probe = self.folder / f".step-{0:08d}.{secrets.token_hex(8)}"
            probe.mkdir()
            probe.rmdir()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no checkpoint can be written into {self.folder}: {error}") from error

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, damaged or not, in order."""
        names = (WHOLE.fullmatch(path.name) for path in self.folder.iterdir() if _has_files(path))
        return sorted(int(match[1]) for match in names if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write ``state``, of tensors, numbers, strings, lists, tuples and dicts; then delete the oldest.

        Raises CheckpointError where that fails: then what was there before is still there.
        """
        partial = self.folder / f".{self.path(step).name}.{secrets.token_hex(8)}"
        try:
            partial.mkdir()
            self._fill(partial, step, state)
            if self.path(step).exists():  # damaged, or another run's
                self.path(step).rename(self.folder / f"replaced-{step:08d}-{secrets.token_hex(4)}")
            partial.rename(self.path(step))
            sync(self.folder)
        except OSError as error:
            _remove(partial)
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written into {self.folder}: {error}; {self.last()}"
            ) from error
        except BaseException:
            _remove(partial)
            raise
        for old in [each for each in self.steps if each <= step][: -self.keep]:
            self._delete(old)

    def _fill(self, partial: Path, step: int, state: Mapping[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        name = "process-0.pt"
        with buffer.getbuffer() as content:  # held beyond an error, it would keep the buffer from closing
            described = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            (partial / name).write_bytes(content)
        manifest = {"format": FORMAT, "step": step, "torch": torch.__version__, "files": {name: described}}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (partial / name, partial / MANIFEST, partial):
            sync(path)

    def load(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(step, state) of each checkpoint that is whole, newest first; warns of each that is not.

        Removes what a crash has left half-written.
        """
        for path in self.folder.iterdir():
            if PARTIAL.fullmatch(path.name):
                _remove(path)
        for step in reversed(self.steps):
            try:
                state = self._read(step)
            except CheckpointError as error:
                before = [other for other in self.steps if other < step]
                then = f"using that of step {before[-1]}" if before else "there is none before it"
                warnings.warn(f"{error}; {then}", DamagedCheckpointWarning, stacklevel=4)
                continue
            yield step, state

    def _read(self, step: int) -> dict[str, Any]:
        path = self.path(step)
        try:
            manifest = read_json(path / MANIFEST)
            if manifest.get("format") != FORMAT or manifest.get("step") != step:
                raise CheckpointError(f"{path} is not a checkpoint of this version ({FORMAT})")
            (name,) = manifest["files"]
            content = (path / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != manifest["files"][name]["sha256"]:
                raise CheckpointError(f"the checkpoint {path} is damaged: {name} does not match its hash")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except CheckpointError:
            raise
        except (AdapterError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error

    def clear(self) -> None:
        """Delete all checkpoints that are there."""
        for step in self.steps:
            self._delete(step)

    def last(self) -> str:
        """Where the newest is, in words."""
        return (
            f"the last good one is {self.path(self.steps[-1])}" if self.steps else "there is none before it"
        )

    def _delete(self, step: int) -> None:
        """Where it is ours; under another name first, so that no half of it looks whole."""
        path = self.path(step)
        try:
            ours = read_json(path / MANIFEST).get("format") == FORMAT
        except AdapterError:
            return
        if ours:
            hidden = self.folder / f".{path.name}.{secrets.token_hex(8)}"
            path.rename(hidden)
            _remove(hidden)


def _has_files(folder: Path) -> bool:
    """Of a checkpoint: one of them may be missing, where it is damaged."""
    return (folder / MANIFEST).is_file() or (folder / "process-0.pt").is_file()


def _remove(folder: Path) -> None:
    """The files that a checkpoint has, and the folder, unless somebody put another file into it."""
    with suppress(OSError):
        for path in [*folder.glob("process-*.pt"), folder / MANIFEST]:
            path.unlink(missing_ok=True)
        folder.rmdir()
