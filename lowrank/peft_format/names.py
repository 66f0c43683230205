"""The names that a model's modules had in earlier versions of transformers, which older adapters still use.

The tables are transformers' own, which PEFT uses too; where a model is of another library there are none.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from lowrank.layers.tree import base_modules


def present_name(model: nn.Module) -> Callable[[str], str]:
    """A function from the name of a tensor in a PEFT folder, without prefix, to its name in ``model``.

    A name is changed only where ``model`` has no such module, but has one of the new name.
    """
    paths = base_modules(model).keys()
    renamings = _renamings(model)

    def name(old: str) -> str:
        if not renamings or _module(old) in paths:
            return old
        for renamed in renamings:
            new = renamed(old)
            if _module(new) in paths:
                return new
        return old

    return name


def _module(name: str) -> str:
    """The path of the module that a tensor belongs to."""
    if ".lora_" in name:
        return re.split(r"(?:\.base_layer)*\.lora_(?:[AB]\.|embedding_[AB]$|magnitude_vector)", name)[0]
    if ".token_adapter." in name:
        return name.partition(".token_adapter.")[0]
    return name.removesuffix(".base_layer.weight") if ".base_layer." in name else name.rpartition(".")[0]


def _renamings(model: nn.Module) -> list[Callable[[str], str]]:
    found: list[Callable[[str], str]] = []
    table = getattr(model, "_checkpoint_conversion_mapping", None)  # transformers 4.52 and later
    if isinstance(table, dict) and table:
        found.append(lambda name: _first_of(table, name))
    if any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        found += _by_transforms(model)
    return found


def _first_of(table: dict[str, str], name: str) -> str:
    for pattern, replacement in table.items():
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name


def _by_transforms(model: nn.Module) -> list[Callable[[str], str]]:
    """The renamings of transformers 5, which also turns some weights into others: of these names are kept."""
    try:
        mapping: Any = importlib.import_module("transformers.conversion_mapping")
        loading: Any = importlib.import_module("transformers.core_model_loading")
        every = mapping.get_model_conversion_mapping(model)
        transforms = [each for each in every if isinstance(each, loading.WeightRenaming)]
    except (ImportError, AttributeError):  # transformers 4
        return []

    def renamed(name: str) -> str:
        for transform in transforms:
            name, _ = transform.rename_source_key(name)
        return name

    return [renamed]
