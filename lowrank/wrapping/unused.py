"""Adapted layers that nothing uses are noticed and named. What a model computes stays the same."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowrank.adapters import adapted_layers, adapter_parameters, wrapped_root
from lowrank.layers.linear import LoRALinear, seen_by_compiler


def unused_layers(model: nn.Module) -> list[str]:
    """Paths of the adapted layers that no forward has used so far, neither called nor read by their weight.

    Empty where nothing is known: no adapted layer was used yet, or compiled code ran, which keeps no record.
    """
    layers = replaced_layers(model)
    if seen_by_compiler() or not any(layer.used for layer in layers.values()):
        return []
    return [path for path, layer in layers.items() if not layer.used]


def layers_only_read(model: nn.Module) -> set[str]:
    """Paths of the adapted layers whose weight was read and which were not called, while others were."""
    layers = replaced_layers(model)
    if seen_by_compiler() or not any(layer.called for layer in layers.values()):
        return set()
    return {path for path, layer in layers.items() if layer.read and not layer.called}


def replaced_layers(model: nn.Module) -> dict[str, LoRALinear]:
    layers = adapted_layers(wrapped_root(model))
    return {path: layer for path, layer in layers.items() if isinstance(layer, LoRALinear)}


def describe_unused(paths: Sequence[str]) -> str:
    """What a warning says of adapted layers that nothing has used."""
    shown = ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
    return (
        f"no forward has used these adapted layers so far: {shown}. Their adapters have no effect and do "
        "not train. If no later batch uses them, leave them out with exclude=: the model may "
        "hold the original layer in a place that cannot be replaced, or read its weight in a packed form"
    )


def warn_at_first_backward(model: nn.Module) -> None:
    """Adapters that the first backward does not reach are named in a warning; afterwards no hook is left."""
    handles: list[RemovableHandle] = []
    root = weakref.ref(model)

    def check() -> None:
        wrapped = root()
        if wrapped is None or "_lowrank" not in wrapped.__dict__:
            return
        idle = [
            path
            for path, layer in replaced_layers(wrapped).items()
            if not layer.used and all(p.grad is None for p in layer.adapters.parameters())
        ]
        if idle:
            warnings.warn(describe_unused(idle), stacklevel=2)

    def first(parameter: Tensor) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()
        if seen_by_compiler():  # only the gradients tell then, when all are there
            torch.autograd.Variable._execution_engine.queue_callback(check)
        else:
            check()

    for parameter in adapter_parameters(model):
        handles.append(parameter.register_post_accumulate_grad_hook(first))
