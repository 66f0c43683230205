"""A model with adapters in it: finding them, and switching them off.

What is in a model is read from the model. Putting adapters in is `wrapping.install`'s affair, taking them out
`merging`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from lowrank.layers.adapter import Adapter
from lowrank.layers.linear import LoRALinear
from lowrank.layers.trained import TrainedModule
from lowrank.layers.weight import AdaptedWeight, WeightAdapters
from lowrank.models.projections import Projection
from lowrank.plan import Plan


@dataclass(frozen=True)
class Adaptation:
    """What was done to a model, kept on it as ``_lowrank``: enough to undo it and to save it."""

    plan: Plan
    required_grad: frozenset[str]  # parameters that required grad before, by their names then


def wrapped_root(model: nn.Module) -> nn.Module:
    """The module that was adapted: ``model``, or the one inside it (a compiled or parallel wrapper).

    Raises ValueError where there is none, or more than one: parts that were wrapped apart.
    """
    found = [path for path, module in model.named_modules() if "_lowrank" in module.__dict__]
    if not found:
        raise ValueError("the model is not wrapped: call wrap_model(model, policy) first")
    if len(found) > 1:
        raise ValueError(f"these parts were wrapped apart, so name one of them: {', '.join(found)}")
    return model.get_submodule(found[0])


def plan_of(model: nn.Module) -> Plan:
    """The plan that a wrapped model was built by, with the energy of each start where it is known."""
    return wrapped_root(model).__dict__["_lowrank"].plan


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted modules by path: `LoRALinear`s, and modules adapted on the weight."""
    kinds: Any = (LoRALinear, AdaptedWeight)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What the adapters train, also while it is frozen; modules trained in full are not among it."""
    for module in model.modules():
        if isinstance(module, Adapter):
            yield from module.trained()


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, ``model`` is exactly the base model, modules trained in full included."""
    root = wrapped_root(model)
    switches = [m for m in root.modules() if isinstance(m, (LoRALinear, WeightAdapters, TrainedModule))]
    before = [switch.enabled for switch in switches]
    for switch in switches:
        switch.enabled = False
    try:
        yield model
    finally:
        for switch, enabled in zip(switches, before, strict=True):
            switch.enabled = enabled


def added_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter that wrapping put beside the base's, frozen or not."""
    for module in model.modules():
        if isinstance(module, (Adapter, TrainedModule)):
            yield from (module.copy if isinstance(module, TrainedModule) else module).parameters()


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by its path there, a shared one at each of its places.

    ``model`` may be wrapped. An adapted layer or a module trained in full is listed as it hangs in ``model``,
    and below it what its base holds.
    """
    found: dict[str, nn.Module] = {"": model}

    def walk(module: nn.Module, prefix: str) -> None:
        inner = module.base if isinstance(module, (LoRALinear, TrainedModule)) else module
        for name, child in inner._modules.items():
            if child is not None and not isinstance(child, WeightAdapters):
                found[f"{prefix}{name}"] = child
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    return found


def adapters_of(model: nn.Module) -> dict[Projection, Adapter]:
    """Projection → its adapter, in the plan's order, of the wrapped ``model``."""
    root = wrapped_root(model)
    found = {}
    for p in plan_of(root).adapted:
        module = root.get_submodule(p.module)
        held = module.lora.of(p.param) if isinstance(module, AdaptedWeight) else module.adapters
        (found[p],) = [adapter for adapter in cast("list[Adapter]", held) if adapter.rows == p.rows]
    return found


def holder(root: nn.Module, p: Projection) -> nn.Module:
    """The base's own module that holds ``p``'s weight, in a wrapped model."""
    module = root.get_submodule(p.module)
    return module.base if isinstance(module, LoRALinear) else module
