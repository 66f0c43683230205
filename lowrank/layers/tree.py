"""Walks a model past what hangs in it: which module of the base is beneath, and what hangs there for whom."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from lowrank.layers.layer import AdaptedLayer
from lowrank.layers.trained import TrainedModule
from lowrank.layers.weight import AdaptedWeight, WeightAdapters


def hung_by_name(module: Any) -> dict[str, nn.Module]:
    """What hangs at ``module`` itself, by the name of the adapter that it belongs to; may be changed."""
    if isinstance(module, AdaptedLayer):
        return module.adapters._modules
    if isinstance(module, TrainedModule):
        return module.copies._modules
    held = module.lora if isinstance(module, AdaptedWeight) else module
    return held._modules if isinstance(held, WeightAdapters) else {}


def without_copies(module: nn.Module) -> nn.Module:
    """What hangs beneath the copies of a module trained in full; else ``module``."""
    return module.base if isinstance(module, TrainedModule) else module


def original(module: nn.Module) -> nn.Module:
    """The base's own module beneath what was put in its place."""
    module = without_copies(module)
    return module.base if isinstance(module, AdaptedLayer) else module


def hung_at(root: nn.Module, path: str) -> nn.Module:
    """What hangs at a ``path`` of the base, in a wrapped model."""
    module = root
    for part in path.split(".") if path else ():
        module = cast(nn.Module, original(module)._modules[part])
    return module


def hung_modules(model: nn.Module) -> list[nn.Module]:
    """Every module of the base once, as it hangs in ``model``, which may be wrapped. Cycles are allowed."""
    found, waiting = {model: None}, [model]
    while waiting:
        for child in original(waiting.pop())._modules.values():
            if child is not None and child not in found and not isinstance(child, WeightAdapters):
                found[child] = None
                waiting.append(child)
    return list(found)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by its path there, a shared one at each of its places.

    ``model`` may be wrapped. An adapted layer or a module trained in full is listed as it hangs in ``model``,
    and below it what its base holds.
    """
    found: dict[str, nn.Module] = {"": model}

    def walk(module: nn.Module, prefix: str, above: frozenset[nn.Module]) -> None:
        for name, child in module._modules.items():
            if child is not None and not isinstance(child, WeightAdapters):
                found[f"{prefix}{name}"] = child
                if original(child) not in above:
                    walk(original(child), f"{prefix}{name}.", above | {original(child)})

    walk(original(model), "", frozenset({original(model)}))
    return found


def state_as(module: nn.Module, name: str) -> dict[str, Tensor]:
    """The state of ``module`` as ``name`` has it: of its copy, or of the base."""
    if isinstance(module, TrainedModule) and name in module.copies:
        return module.copies[name].state_dict()
    base = original(module)
    if not any(map(hung_by_name, base.modules())):
        return base.state_dict()
    state = dict(base._parameters) | {
        key: buffer for key, buffer in base._buffers.items() if key not in base._non_persistent_buffers_set
    }
    held = {key: tensor.detach() for key, tensor in state.items() if tensor is not None}
    for leaf, child in base._modules.items():
        if child is not None and not isinstance(child, WeightAdapters):
            held |= {f"{leaf}.{key}": tensor for key, tensor in state_as(child, name).items()}
    return held
