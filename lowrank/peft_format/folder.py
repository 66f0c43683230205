"""What lies in a PEFT folder: a configuration, LoRA factors by module, and modules trained in full.

It reads one, and puts a new one in its place; what a model has to do with it, `export` and `load` say.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lowrank.files import (
    AdapterError,
    Entry,
    make_folder,
    read_header,
    read_json,
    read_tensors,
    sync,
    unused_name,
)
from lowrank.layers.tree import base_modules
from lowrank.peft_format.config import PeftConfig
from lowrank.peft_format.factors import BASE, FACTOR, read_factors
from lowrank.peft_format.pairs import Pair

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FILES = CONFIG, TENSORS
PREFIX = "base_model.model."
MAGNITUDE = ".lora_magnitude_vector"

# What the keys of PEFT features contain that are not supported.
FEATURES = {
    "lora_A.bias": "lora_bias",
    "lora_B.bias": "lora_bias",
    "base_layer": "a saved base weight, or a tensor that no Linear holds (target_parameters, attention)",
}


@dataclass(frozen=True)
class Contents:
    """A folder as its configuration and its tensors' header describe it; no tensor has been read.

    Args:
        layers: module path → "A" and "B" → what the header says of the factor.
        magnitudes: module path → what the header says of its magnitudes (DoRA).
        others: the remaining tensors, by their names in the base model.
        keys: of every tensor, by such names, as the file has them.
    """

    folder: Path
    config: PeftConfig
    layers: Mapping[str, Mapping[str, Entry]]
    magnitudes: Mapping[str, Entry]
    others: Mapping[str, Entry]
    keys: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path, rename: Callable[[str], str] = str) -> Contents:
        """``rename`` gives a tensor's name in the base model for the one in the file.

        Raises AdapterError where the folder holds no plain LoRA adapter in safetensors.
        """
        if not (folder / CONFIG).is_file():
            ours = (folder / "adapter.json").exists()
            hint = "; this is an adapter of lowrank's own: load_adapter(model, path)" if ours else ""
            raise AdapterError(f"{folder} holds no {CONFIG}{hint}")
        config = PeftConfig.read(read_json(folder / CONFIG))
        if not (folder / TENSORS).is_file() and (folder / PICKLED).exists():
            raise AdapterError(
                f"{folder / PICKLED} is a pickle, which could run anything: "
                "load it with PEFT and save it again, as safetensors"
            )
        layers: dict[str, dict[str, Entry]] = {}
        magnitudes: dict[str, Entry] = {}
        others: dict[str, Entry] = {}
        keys: dict[str, str] = {}
        for key, entry in read_header(folder / TENSORS).items():
            for part, feature in FEATURES.items():
                if part in key and not key.endswith(BASE):
                    raise AdapterError(f"{folder}, {key}: {feature} is not supported")
            if not key.startswith(PREFIX):
                raise AdapterError(f"{folder}, {key!r}: PEFT's names start with {PREFIX}")
            name = rename(key.removeprefix(PREFIX)).replace(f"{MAGNITUDE}.weight", MAGNITUDE)
            if name in keys:
                raise AdapterError(f"{folder}: {keys[name]} and {key} are the same weight of this model")
            keys[name] = key
            factor = FACTOR.fullmatch(name)
            if factor:
                layers.setdefault(factor[1], {})[factor[2] or factor[3]] = entry
            elif name.endswith(MAGNITUDE):
                magnitudes[name.removesuffix(MAGNITUDE)] = entry
            else:
                others[name] = entry
        stray = [name for name in others if name.endswith(BASE) and name.removesuffix(BASE) not in layers]
        if stray:
            feature = FEATURES["base_layer"]
            raise AdapterError(f"{folder}, {keys[stray[0]]}: {feature} is not supported")
        if not layers:
            raise AdapterError(f"{folder} holds no LoRA factors")
        return cls(folder, config, layers, magnitudes, others, keys)

    def tensors(self) -> Tensors:
        """Reads everything; raises AdapterError where a number is not finite."""
        read = read_tensors(self.folder / TENSORS)
        for name, tensor in read.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise AdapterError(f"{self.folder}, {name}: holds NaN or Inf")
        return Tensors({name: read[key] for name, key in self.keys.items()}, self.config)


@dataclass(frozen=True)
class Tensors:
    """The tensors of a folder, by their names in the base model."""

    read: Mapping[str, Tensor]
    config: PeftConfig

    def pair(self, path: str) -> Pair:
        A, B = read_factors(self.read, path)
        return Pair(A, B, self.config.scaling(path))

    def magnitude(self, path: str) -> Tensor:
        return self.read[f"{path}{MAGNITUDE}"]

    def state(self, path: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of the module at ``path``, with the names of ``like``."""
        return {name: self.read[f"{path}.{name}"] for name in like}


def base_paths(model: nn.Module) -> dict[str, nn.Module]:
    """Every path of the base model below its root; see `base_modules`."""
    return {path: module for path, module in base_modules(model).items() if path}


def ancestors(path: str) -> Iterator[str]:
    """The paths around ``path``, the outermost first."""
    parts = path.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts)))


def places(model: nn.Module) -> Counter[nn.Module]:
    """In how many places each module hangs in ``model``. PEFT would adapt it in one of them."""
    return Counter(
        child for parent in model.modules() for child in parent._modules.values() if child is not None
    )


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder to write to: its files are those of ``path`` in the end, and disappear on an error.

    Where ``path`` is there already, the two files of an adapter are replaced in one step and the rest stays:
    at every moment, also after a crash, ``path`` holds the old adapter or the new one.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder")
    existing = next(each for each in (path, *path.parents) if each.is_dir())
    room = unused_name(existing / path.name)
    new = room / "new"
    room.mkdir()
    try:
        new.mkdir()
        yield new
        if existing == path:
            _exchange(path, room)
        else:
            make_folder(path.parent)
            os.replace(new, path)
            sync(path.parent)
    finally:
        if not any(_leads_into(path / name, room) for name in FILES):
            shutil.rmtree(room, ignore_errors=True)


def _exchange(path: Path, room: Path) -> None:
    """The files of ``room``/new take the place of those of ``path``, all at once.

    Two files cannot be renamed in one step, but a link that both go through can. They become links to
    ``room``/now, which points to the old files and after one rename to the new ones; then files again.
    """
    old, new, now = room / "old", room / "new", room / "now"
    old.mkdir()
    for name in FILES:
        if (path / name).exists():
            _copy(path / name, old / name)
    try:
        now.symlink_to("old")
    except (OSError, NotImplementedError):  # without a configuration in between there is no mixture either
        (path / CONFIG).unlink(missing_ok=True)
        os.replace(new / TENSORS, path / TENSORS)
        os.replace(new / CONFIG, path / CONFIG)
        return
    sync(room)
    try:
        for name in FILES:
            _link(path / name, f"{room.name}/now/{name}")
        sync(path)
        _link(now, "new")
        sync(room)
    finally:
        for name in FILES:
            if _leads_into(path / name, room):
                _settle(path / name)
        sync(path)


def _link(path: Path, target: str) -> None:
    """A symbolic link at ``path``, in the place of what was there."""
    temporary = unused_name(path)
    temporary.symlink_to(target)
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """The file that the link ``path`` leads to, in the place of the link."""
    if not path.exists():
        return path.unlink()
    temporary = unused_name(path)
    try:
        _copy(path.resolve(), temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """The same content under another name."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        sync(target)


def _leads_into(path: Path, folder: Path) -> bool:
    return path.is_symlink() and path.resolve().is_relative_to(folder.resolve())
