"""What PEFT's ``adapter_config.json`` says: which modules are adapted, with what rank and scaling.

Patterns mean here what they mean to PEFT. What this library does not do is refused by name, features of
later versions included. It knows no model and no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lowrank.files import AdapterError
from lowrank.peft_format.patterns import Patterns, shortened

# What an adapter does not depend on once it is trained: where it came from, and how it was started.
HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path revision task_type inference_mode peft_type "
    "megatron_core eva_config corda_config lora_ga_config loftq_config qalora_group_size "
    "runtime_config".split()
)
READ = frozenset(
    "r lora_alpha rank_pattern alpha_pattern target_modules exclude_modules use_rslora lora_dropout "
    "fan_in_fan_out modules_to_save init_lora_weights layers_to_transform layers_pattern bias "
    "target_parameters peft_version trainable_token_indices use_dora".split()
)
STARTS = frozenset({"gaussian", "eva", "orthogonal", "mica"})  # these leave the base's weights alone


@dataclass(frozen=True)
class PeftConfig:
    """The fields that decide what an adapter computes, checked.

    Args:
        r, alpha: where no pattern matches; 8 unless said otherwise.
        ranks, alphas: ``rank_pattern`` and ``alpha_pattern``.
        targets: paths or their dotted ends, one regular expression, or None: PEFT's choice by family.
        excluded: paths or their dotted ends.
        rslora: the scaling is alpha / √r instead of alpha / r.
        dropout: on the adapters' inputs, in training.
        trained: ends of the paths of modules trained in full.
        tokens: ``trainable_token_indices``: ids of rows that train, by the end of an embedding's path, or of
            the input embedding.
        dora: each adapted module has a magnitude for each output row.
        by_layer: ``layers_to_transform`` narrows the targets.
        parameters: ``target_parameters``, tensors of experts by their names or the dotted ends of these.
        version: of the PEFT that wrote it, where it says so.
    """

    r: int = 8
    alpha: float = 8.0
    ranks: Patterns = field(default_factory=lambda: Patterns({}))
    alphas: Patterns = field(default_factory=lambda: Patterns({}))
    targets: str | frozenset[str] | None = None
    excluded: str | frozenset[str] = frozenset()
    rslora: bool = False
    dropout: float = 0.0
    trained: frozenset[str] = frozenset()
    tokens: Mapping[str, tuple[int, ...]] | tuple[int, ...] = field(default_factory=dict)
    by_layer: bool = False
    parameters: frozenset[str] = frozenset()
    version: str | None = None
    dora: bool = False

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> PeftConfig:
        """Raises AdapterError where ``data`` is no configuration of plain LoRA."""
        if data.get("peft_type") != "LORA":
            raise AdapterError(f"peft_type is {data.get('peft_type')!r}; only LORA adapters can be imported")
        for name, value in data.items():
            if name not in HARMLESS | READ and value not in (None, False, 0, "", [], {}):
                raise AdapterError(
                    f"{name} = {shortened(value)} is a PEFT feature that lowrank does not have"
                )
        if data.get("bias", "none") != "none":
            raise AdapterError(
                f"bias = {shortened(data['bias'])}: trained biases are not supported, only 'none' is"
            )
        _check_start(data.get("init_lora_weights", True))
        layers = data.get("layers_to_transform")
        return cls(
            r=_rank(data.get("r", 8), "r"),
            alpha=_number(data.get("lora_alpha", 8), "lora_alpha"),
            ranks=Patterns({key: _rank(n, key) for key, n in _mapping(data, "rank_pattern").items()}),
            alphas=Patterns({key: _number(n, key) for key, n in _mapping(data, "alpha_pattern").items()}),
            targets=_names(data, "target_modules", None),
            excluded=_names(data, "exclude_modules", None) or frozenset(),
            rslora=_flag(data, "use_rslora"),
            dropout=_dropout(data.get("lora_dropout", 0.0)),
            trained=_listed(_names(data, "modules_to_save", None) or frozenset(), "modules_to_save"),
            tokens=_tokens(data.get("trainable_token_indices") or {}),
            dora=_flag(data, "use_dora"),
            by_layer=layers is not None and layers != [],
            parameters=_listed(_names(data, "target_parameters", None) or frozenset(), "target_parameters"),
            version=_text(data, "peft_version"),
        )

    def rank(self, path: str) -> int:
        """The rank of the module at ``path``."""
        return self.ranks.value(path, self.r)

    def scaling(self, path: str) -> float:
        """The factor of B·A at ``path``."""
        rank = self.rank(path)
        return self.alphas.value(path, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    @property
    def lists_targets(self) -> bool:
        """Are the adapted modules spelled out?

        An expression, a family's default and a choice of layers are not evaluated here: with these, the
        tensors' own names say what is adapted.
        """
        strings = isinstance(self.targets, str) or isinstance(self.excluded, str)
        return self.targets is not None and not strings and not self.by_layer

    def adapts(self, path: str) -> bool:
        """Would PEFT adapt a linear module at ``path``? Only where `lists_targets`."""
        assert isinstance(self.targets, frozenset) and isinstance(self.excluded, frozenset)
        parts = path.split(".")
        ends = {".".join(parts[i:]) for i in range(len(parts))}
        if self.targets.isdisjoint(ends) or not self.excluded.isdisjoint(ends):
            return False
        within = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
        return self.trained.isdisjoint(within)

    def adapts_parameter(self, name: str) -> bool:
        """Would PEFT adapt the parameter ``name`` of a module? Nothing excludes it there."""
        parts = name.split(".")
        return any(".".join(parts[i:]) in self.parameters for i in range(len(parts)))

    def trains(self, path: str) -> bool:
        """Would PEFT train the module at ``path`` in full? It compares the ends of strings, not of paths."""
        return not self.trained.isdisjoint(path[i:] for i in range(len(path)))

    def check_cost(self, paths: Collection[str]) -> None:
        """Raises AdapterError where the patterns would take too long on these paths of the model."""
        self.ranks.check_cost(paths, "rank_pattern")
        self.alphas.check_cost(paths, "alpha_pattern")


# -- checks -------------------------------------------------------------------------------------------


def _check_start(start: Any) -> None:
    if isinstance(start, bool) or (isinstance(start, str) and start in STARTS):
        return
    if isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "lora_ga", "loftq")):
        raise AdapterError(
            f"init_lora_weights = {start!r} rewrote the base's weights, and this folder means something only "
            "beside those. Convert it with PEFT, from the adapter as it was saved before training: "
            "save_pretrained(new_folder, path_initial_model_for_weight_conversion=folder_before_training); "
            "then import the new folder"
        )
    raise AdapterError(f"init_lora_weights = {shortened(start)} is unknown")


def _mapping(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = data.get(name) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{name}: expected a mapping of module names, got {shortened(value)}")
    return value


def _names(data: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    value = data.get(name)
    if value is None:
        return otherwise
    if isinstance(value, list) and all(isinstance(each, str) and each for each in value):
        return frozenset(value)
    if isinstance(value, str):
        return value
    raise AdapterError(f"{name}: expected a list of names, got {shortened(value)}")


def _listed(value: Any, name: str) -> frozenset[str]:
    if isinstance(value, str):
        raise AdapterError(f"{name}: expected a list of names, got {value!r}")
    return value


def _tokens(value: Any) -> Any:
    if isinstance(value, dict) and all(isinstance(key, str) and key for key in value):
        return {key: _tokens(ids) for key, ids in value.items()}
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise AdapterError(f"trainable_token_indices: expected a list of token ids, got {shortened(value)}")
    if len(set(value)) != len(value):
        raise AdapterError(f"trainable_token_indices = {shortened(value)} has an id twice")
    return tuple(value)


def _rank(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise AdapterError(f"the rank of {name}: expected an integer of at least 1, got {shortened(value)}")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e30:
        raise AdapterError(f"the alpha of {name}: expected a number, got {shortened(value)}")
    return float(value)


def _dropout(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise AdapterError(f"lora_dropout: expected a number from 0 to below 1, got {shortened(value)}")
    return float(value)


def _text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise AdapterError(f"{name}: expected a string, got {shortened(value)}")
    return value


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name) or False
    if not isinstance(value, bool):
        raise AdapterError(f"{name}: expected true or false, got {shortened(value)}")
    return value
