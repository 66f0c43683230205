"""What lies in a PEFT folder: a configuration, LoRA factors by module, and modules trained in full.

It reads one, and puts a new one in its place; what a model has to do with it, `export` and `load` say.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lowrank.adapted import base_modules
from lowrank.files import AdapterError, Entry, read_header, read_json, read_tensors
from lowrank.peft_format.config import PeftConfig
from lowrank.peft_format.pairs import Pair

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

# What the keys of PEFT features contain that are not supported.
FEATURES = {
    "lora_magnitude_vector": "DoRA (use_dora)",
    "lora_embedding_": "an adapted embedding",
    "lora_A.bias": "lora_bias",
    "lora_B.bias": "lora_bias",
    "base_layer": "a saved base weight, or a tensor that no Linear holds (target_parameters, attention)",
}


@dataclass(frozen=True)
class Contents:
    """A folder as its configuration and its tensors' header describe it; no tensor has been read.

    Args:
        layers: module path → "A" and "B" → what the header says of the factor.
        others: the remaining tensors, by their names in the base model.
    """

    folder: Path
    config: PeftConfig
    layers: Mapping[str, Mapping[str, Entry]]
    others: Mapping[str, Entry]

    @classmethod
    def read(cls, folder: Path) -> Contents:
        """Raises AdapterError where the folder holds no plain LoRA adapter in safetensors."""
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
        others: dict[str, Entry] = {}
        for key, entry in read_header(folder / TENSORS).items():
            for part, feature in FEATURES.items():
                if part in key:
                    raise AdapterError(f"{folder}, {key}: {feature} is not supported")
            if not key.startswith(PREFIX):
                raise AdapterError(f"{folder}, {key!r}: PEFT's names start with {PREFIX}")
            name = key.removeprefix(PREFIX)
            factor = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name, re.DOTALL)
            if factor:
                layers.setdefault(factor[1], {})[factor[2]] = entry
            else:
                others[name] = entry
        if not layers:
            raise AdapterError(f"{folder} holds no LoRA factors")
        return cls(folder, config, layers, others)

    def tensors(self) -> Tensors:
        """Reads everything; raises AdapterError where a number is not finite."""
        read = read_tensors(self.folder / TENSORS)
        for name, tensor in read.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise AdapterError(f"{self.folder}, {name}: holds NaN or Inf")
        return Tensors(read, self.config)


@dataclass(frozen=True)
class Tensors:
    """The tensors of a folder."""

    read: Mapping[str, Tensor]
    config: PeftConfig

    def pair(self, path: str) -> Pair:
        A, B = (self.read[f"{PREFIX}{path}.lora_{factor}.weight"] for factor in "AB")
        return Pair(A, B, self.config.scaling(path))

    def state(self, path: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of the module at ``path``, with the names of ``like``."""
        return {name: self.read[f"{PREFIX}{path}.{name}"] for name in like}


def base_paths(model: nn.Module) -> dict[str, nn.Module]:
    """Every path of the base model below its root; see `base_modules`."""
    return {path: module for path, module in base_modules(model).items() if path}


def places(model: nn.Module, module: nn.Module) -> int:
    """In how many places ``module`` hangs in ``model``. PEFT would adapt it in one of them."""
    return sum(child is module for parent in model.modules() for child in parent._modules.values())


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder to write to: it becomes ``path`` in the end, and disappears on an error.

    Where ``path`` is there already, the two files of an adapter are replaced and the rest stays.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder")
    existing = next(each for each in (path, *path.parents) if each.is_dir())
    folder = existing / f".{path.name}.{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
        if path.is_dir():
            # Without a configuration in between, so that a crash leaves no mixture of two adapters.
            (path / CONFIG).unlink(missing_ok=True)
            os.replace(folder / TENSORS, path / TENSORS)
            os.replace(folder / CONFIG, path / CONFIG)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
