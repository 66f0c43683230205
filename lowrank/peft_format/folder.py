"""What lies in a PEFT folder: a configuration, LoRA factors by module, and modules trained in full.

It reads one; `staging` puts a new one in its place. What a model has to do with it, `export` and `load` say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lowrank.files import (
    AdapterError,
    Entry,
    read_header,
    read_json,
    read_tensors,
)
from lowrank.layers.tree import base_modules
from lowrank.peft_format.config import PeftConfig
from lowrank.peft_format.experts import Experts, experts_in, names_of_factors, written_by_old
from lowrank.peft_format.factors import BASE, FACTOR, read_factors
from lowrank.peft_format.pairs import Pair
from lowrank.peft_format.staging import CONFIG, TENSORS

PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
MAGNITUDE = ".lora_magnitude_vector"

# What the keys of PEFT features contain that are not supported.
FEATURES = {
    "lora_A.bias": "lora_bias",
    "lora_B.bias": "lora_bias",
    "base_layer": "a saved base weight, or a tensor that no Linear holds and target_parameters does not name",
}


@dataclass(frozen=True)
class Contents:
    """A folder as its configuration and its tensors' header describe it; no tensor has been read.

    Args:
        layers: module path, or name of experts → "A" and "B" → what the header says of the factor.
        magnitudes: module path → what the header says of its magnitudes (DoRA).
        others: the remaining tensors, by their names in the base model.
        keys: of every tensor, by such names, as the file has them.
        experts: what ``target_parameters`` names, by its name.
        old: the factors of experts are those of PEFT before 0.19.
    """

    folder: Path
    config: PeftConfig
    layers: Mapping[str, Mapping[str, Entry]]
    magnitudes: Mapping[str, Entry]
    others: Mapping[str, Entry]
    keys: Mapping[str, str]
    experts: Mapping[str, Experts]
    old: bool

    @classmethod
    def read(
        cls, folder: Path, model: nn.Module | None = None, rename: Callable[[str], str] = str
    ) -> Contents:
        """``rename`` gives a tensor's name in the base ``model`` for the one in the file.

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
        if model is None and config.parameters:
            raise AdapterError(
                f"{folder}: target_parameters can be read only beside the model: import_peft(model, path)"
            )
        experts = {} if model is None else experts_in(model, config)
        placed = names_of_factors(experts)
        layers: dict[str, dict[str, Entry]] = {}
        magnitudes: dict[str, Entry] = {}
        others: dict[str, Entry] = {}
        keys: dict[str, str] = {}
        for key, entry in read_header(folder / TENSORS).items():
            name = rename(key.removeprefix(PREFIX)).replace(f"{MAGNITUDE}.weight", MAGNITUDE)
            name = placed.get(name, name)
            for part, feature in FEATURES.items():
                if part in name and not key.endswith(BASE):
                    raise AdapterError(f"{folder}, {key}: {feature} is not supported")
            if not key.startswith(PREFIX):
                raise AdapterError(f"{folder}, {key!r}: PEFT's names start with {PREFIX}")
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
            raise AdapterError(f"{folder}, {keys[stray[0]]}: {FEATURES['base_layer']} is not supported")
        if not layers:
            raise AdapterError(f"{folder} holds no LoRA factors")
        old = written_by_old(config, experts, layers)
        return cls(folder, config, layers, magnitudes, others, keys, experts, old)

    def tensors(self) -> Tensors:
        """Reads everything; raises AdapterError where a number is not finite."""
        read = read_tensors(self.folder / TENSORS)
        for name, tensor in read.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise AdapterError(f"{self.folder}, {name}: holds NaN or Inf")
        return Tensors({n: read[key] for n, key in self.keys.items()}, self.config, self.experts, self.old)


@dataclass(frozen=True)
class Tensors:
    """The tensors of a folder, by their names in the base model."""

    read: Mapping[str, Tensor]
    config: PeftConfig
    experts: Mapping[str, Experts]
    old: bool

    def pair(self, path: str) -> Pair:
        A, B = read_factors(self.read, path)
        pair = Pair(A, B, self.config.scaling(path))
        return self.experts[path].read(pair, self.old) if path in self.experts else pair

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
