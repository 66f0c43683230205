"""Adapted layers that nothing uses are noticed and named. What a model computes stays the same."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowrank.adapters import one_name, wrapped_root
from lowrank.layers.adapter import RowBlocks
from lowrank.layers.layer import AdaptedLayer, seen_by_compiler
from lowrank.layers.tree import base_modules, without_copies
from lowrank.notices import UnusedLayerWarning, few


def unused_layers(model: nn.Module, name: str | None = None) -> list[str]:
    """Paths of the layers that no forward has used so far while ``name`` acted: not called, weight not read.

    Empty where nothing is known: no adapted layer was used yet, or compiled code ran, which keeps no record.
    """
    parts = replaced_layers(model, name)
    if seen_by_compiler() or not any(part.used for part in parts.values()):
        return []
    return [path for path, part in parts.items() if not part.used and not _acts_elsewhere(part, parts)]


def layers_only_read(model: nn.Module, name: str | None = None) -> set[str]:
    """Paths of the layers whose weight was read and which were not called, where a forward has run."""
    parts = replaced_layers(model, name)
    if seen_by_compiler() or not any(part.called or part.read_in_forward for part in parts.values()):
        return set()
    return {path for path, part in parts.items() if part.read and not part.called}


def replaced_layers(model: nn.Module, name: str | None = None) -> dict[str, RowBlocks]:
    """What ``name`` adds to each `AdaptedLayer`, by the path of that in the base; shared layers once."""
    root, name = wrapped_root(model), one_name(model, name)
    layers = {without_copies(hung): path for path, hung in reversed(base_modules(root).items())}
    return {
        path: layer.part(name)
        for layer, path in reversed(layers.items())
        if isinstance(layer, AdaptedLayer) and name in layer.adapters
    }


def _acts_elsewhere(part: RowBlocks, parts: Mapping[str, RowBlocks]) -> bool:
    """Is it nothing but rows that train, which another module with the same weight uses?"""
    tokens = None if part.held() else part.tokens
    return tokens is not None and any(other.used and other.tokens is tokens for other in parts.values())


def describe_unused(paths: Sequence[str]) -> str:
    """What a warning says of adapted layers that nothing has used."""
    return (
        f"no forward has used these adapted layers so far: {few(paths)}. Their adapters have no effect and "
        "do not train. If no later batch uses them, leave them out with exclude=: the model may "
        "hold the original layer in a place that cannot be replaced, or read its weight in a packed form"
    )


def warn_at_first_backward(model: nn.Module, name: str, parameters: Iterable[nn.Parameter]) -> None:
    """Layers that the first backward through ``name`` does not reach are named in a warning.

    Afterwards no hook is left. ``parameters`` are what it trains.
    """
    handles: list[RemovableHandle] = []
    root = weakref.ref(model)

    def check() -> None:
        wrapped = root()
        state = None if wrapped is None else wrapped.__dict__.get("_lowrank")
        if wrapped is None or state is None or name not in state.plans:
            return
        parts = replaced_layers(wrapped, name)
        idle = [
            path
            for path, part in parts.items()
            if not part.used
            and all(p.grad is None for p in part.parameters())
            and not _acts_elsewhere(part, parts)
        ]
        if idle:
            warnings.warn(describe_unused(idle), UnusedLayerWarning, stacklevel=2)

    def first(parameter: Tensor) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()
        if seen_by_compiler():  # only the gradients tell then, when all are there
            torch.autograd.Variable._execution_engine.queue_callback(check)
        else:
            check()

    for parameter in parameters:
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(first))
