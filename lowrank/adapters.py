"""A model with adapters in it: finding them, and choosing which ones act.

What is in a model is read from the model. Putting adapters in is `wrapping.install`'s affair, taking them out
`merging`'s. What acts and what trains are two things: nothing here touches ``requires_grad``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank.layers.acting import Acting
from lowrank.layers.adapter import Adapter
from lowrank.layers.grouped import ExampleAdapters
from lowrank.layers.linear import LoRALinear
from lowrank.layers.trained import TrainedModule
from lowrank.layers.weight import AdaptedWeight, WeightAdapters
from lowrank.models.projections import Projection
from lowrank.plan import Plan

Chosen = str | Iterable[str] | Mapping[str, float]


@dataclass(frozen=True)
class Adaptation:
    """What was done to a model, kept on it as ``_lowrank``: enough to undo it and to save it."""

    plans: dict[str, Plan]  # by adapter name, in the order in which they were added
    acting: Acting  # which all its layers share
    required_grad: frozenset[str]  # parameters that required grad before, by their names then


# -- what is there ------------------------------------------------------------------------------------


def wrapped_root(model: nn.Module) -> nn.Module:
    """The module that was adapted: ``model``, or the one inside it (a compiled or parallel wrapper).

    Raises ValueError where there is none, or more than one: parts that were wrapped apart.
    """
    if "_lowrank" in model.__dict__:
        return model
    found = [path for path, module in model.named_modules() if "_lowrank" in module.__dict__]
    if not found:
        raise ValueError("the model is not wrapped: call wrap_model(model, policy) first")
    if len(found) > 1:
        raise ValueError(f"these parts were wrapped apart, so name one of them: {', '.join(found)}")
    return model.get_submodule(found[0])


def adaptation(model: nn.Module) -> Adaptation:
    return wrapped_root(model).__dict__["_lowrank"]


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters in a wrapped model, in the order in which they were added."""
    return list(adaptation(model).plans)


def one_name(model: nn.Module, name: str | None) -> str:
    """``name``, or where it is None that of the only adapter; raises ValueError where that is no answer."""
    names = adapter_names(model)
    if name is None and len(names) > 1:
        raise ValueError(f"the model has several adapters, so name one of them: {', '.join(names)}")
    if name is not None and name not in names:
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(names)}")
    return names[0] if name is None else name


def plan_of(model: nn.Module, name: str | None = None) -> Plan:
    """The plan that an adapter was built by, with the energy of each start where it is known.

    ``name`` may be left out where there is one adapter. Raises ValueError where there are several, or where
    the model has none of that name.
    """
    return adaptation(model).plans[one_name(model, name)]


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted modules by path: `LoRALinear`s, and modules adapted on the weight."""
    kinds: Any = (LoRALinear, AdaptedWeight)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def adapter_parameters(model: nn.Module, name: str | None = None) -> Iterator[nn.Parameter]:
    """What the adapter ``name`` trains, whether it acts or not, and also while it is frozen.

    Without a name: what all adapters train. Modules trained in full are not among it. Raises ValueError
    where there is no adapter of that name.
    """
    if name is not None:
        one_name(model, name)
    for module in model.modules():
        if isinstance(module, (TrainedModule, WeightAdapters)):  # the latter by the module that holds it
            continue
        for owner, held in hung_by_name(module).items():
            if name in (None, owner):
                for adapter in held.modules():
                    if isinstance(adapter, Adapter):
                        yield from adapter.trained()


def added_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter that wrapping put beside the base's, frozen or not."""
    for module in model.modules():
        if isinstance(module, (Adapter, TrainedModule)):
            yield from (module.copies if isinstance(module, TrainedModule) else module).parameters()


# -- what acts ----------------------------------------------------------------------------------------


def set_adapters(model: nn.Module, names: Chosen) -> nn.Module:
    """From now on these adapters act, and no others; returns ``model``.

    Their updates add up. What trains does not change. Without a mapping nothing is multiplied, and nothing
    is computed that one adapter alone would not need.

    Args:
        names: a name, or names, of adapters that act with weight 1; or a mapping from names to weights, which
            ΔW is multiplied by. Other weights for the same names do not make compiled code compile again.
            ``()``: none, so that the model is exactly its base.

    Raises:
        ValueError: an unknown name, a weight that is not finite, or adapters that cannot act together: a
            module trained in full by one is trained or adapted by another. A weight other than 1 of an
            adapter that trains modules in full.
    """
    adaptation(model).acting.choose(*_checked(model, names))
    return model


@contextmanager
def use_adapters(model: nn.Module, names: Chosen) -> Iterator[nn.Module]:
    """`set_adapters` inside; what acted before acts again afterwards. Arguments and errors as there."""
    chosen, weights = _checked(model, names)
    with _acting(model, chosen, weights):
        yield model


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, ``model`` is exactly the base model, modules trained in full included."""
    with use_adapters(model, ()):
        yield model


@contextmanager
def adapters_for_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Inside, each example of a batch has an adapter of its own, or none: for serving many at once.

    The output of each example is that of a run with its adapter alone, within rounding; that of None is the
    base's. Each projection makes one grouped product for the whole batch. Gradients reach the adapters of all
    examples, so that several can train in one step. Works in ``generate``, where a beam is an example.

    An adapted layer must get the batch as the leading dimension of its input, or an input of two dimensions
    with one row for each example; anything else raises ValueError when it runs, and names the layer.

    Args:
        names: the adapter of each example, in order; None for the base alone.

    Raises:
        ValueError: an unknown name, or an adapter that trains modules in full or is adapted on the weight,
            which examples cannot have apart (all such modules are listed).
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"expected a list with the adapter of each example, got {names!r}")
    used = {one_name(model, name) for name in names if name is not None}
    problems, paths = [], {}
    for path, hung in base_modules(wrapped_root(model)).items():
        layer = without_copies(hung)
        if isinstance(layer, LoRALinear):
            paths[id(layer)] = path
        elif shared := used.intersection(hung_by_name(layer)):
            problems.append(
                f"{path}: {', '.join(sorted(shared))} is added to its weight, which is read without a call"
            )
        if layer is not hung and (shared := used.intersection(hung_by_name(hung))):
            problems.append(f"{path}: trained in full by {', '.join(sorted(shared))}")
    if problems:
        raise ValueError(
            "these modules cannot have an adapter for each example; run the examples of one adapter at a "
            "time, with use_adapters:\n  " + "\n  ".join(problems)
        )
    with _acting(model, (), {}, ExampleAdapters(names, paths)):
        yield model


@contextmanager
def _acting(model: nn.Module, *choice: Any) -> Iterator[None]:
    """Inside this acts; afterwards what did before, as far as it is still there."""
    root, acting = wrapped_root(model), adaptation(model).acting
    before = acting.names, acting.weights, acting.rows
    acting.choose(*choice)
    try:
        yield
    finally:
        acting.choose(*before)
        if "_lowrank" in root.__dict__:
            left = adaptation(root).plans
            acting.names = tuple(name for name in acting.names if name in left)


def _checked(model: nn.Module, names: Chosen) -> tuple[list[str], dict[str, Tensor]]:
    """The names and the weights that ``names`` says, once they can act together."""
    chosen, weights = read_weights(model, names)
    check_together(model, {name: float(weights.get(name, 1.0)) for name in chosen})
    return chosen, weights


def read_weights(model: nn.Module, names: Chosen) -> tuple[list[str], dict[str, Tensor]]:
    """The names and the weights that ``names`` says."""
    given = [names] if isinstance(names, str) else list(names)
    for name in given:
        one_name(model, name)
    weights = {}
    for name, weight in names.items() if isinstance(names, Mapping) else ():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not isfinite(weight):
            raise ValueError(f"expected a finite number as the weight of {name!r}, got {weight!r}")
        weights[name] = torch.tensor(float(weight))  # not in fp64, which the compiler takes for a number
    return list(dict.fromkeys(given)), weights


def check_together(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Raises ValueError where these adapters cannot act together with these weights."""
    plans = adaptation(model).plans
    root = wrapped_root(model)
    for name, weight in weights.items():
        if plans[name].train and weight != 1:
            raise ValueError(
                f"the adapter {name!r} trains {', '.join(plans[name].train)} in full, which has no share: "
                f"expected weight 1, got {weight:.4g}"
            )
        for path in plans[name].train:
            hung = cast(TrainedModule, hung_at(root, path))
            others = [other for other in weights if other != name]
            for other in others:
                if other in hung.copies:
                    raise ValueError(
                        f"{path} is trained in full by both {name!r} and {other!r}: only one of them can act"
                    )
                if any(other in hung_by_name(inner) for inner in hung.base.modules()):
                    raise ValueError(
                        f"{path} is trained in full by {name!r}, and {other!r} adapts it or what lies inside "
                        "it: only one of them can act"
                    )


# -- the base beneath -----------------------------------------------------------------------------------


def hung_by_name(module: Any) -> dict[str, nn.Module]:
    """What hangs at ``module`` itself, by the name of the adapter that it belongs to; may be changed."""
    if isinstance(module, LoRALinear):
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
    return module.base if isinstance(module, LoRALinear) else module


def hung_at(root: nn.Module, path: str) -> nn.Module:
    """What hangs at a ``path`` of the base, in a wrapped model."""
    module = root
    for part in path.split(".") if path else ():
        module = cast(nn.Module, original(module)._modules[part])
    return module


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by its path there, a shared one at each of its places.

    ``model`` may be wrapped. An adapted layer or a module trained in full is listed as it hangs in ``model``,
    and below it what its base holds.
    """
    found: dict[str, nn.Module] = {"": model}

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in original(module)._modules.items():
            if child is not None and not isinstance(child, WeightAdapters):
                found[f"{prefix}{name}"] = child
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    return found


def adapters_of(model: nn.Module, name: str | None = None) -> dict[Projection, Adapter]:
    """Projection → its adapter, in the plan's order, of the adapter ``name`` of the wrapped ``model``."""
    root, name = wrapped_root(model), one_name(model, name)
    found = {}
    for p in plan_of(root, name).adapted:
        module = without_copies(hung_at(root, p.module))
        if isinstance(module, AdaptedWeight):
            held = module.lora.of(name, p.param)
        else:
            held = cast(LoRALinear, module).part(name).held()
        (found[p],) = [adapter for adapter in held if adapter.rows == p.rows]
    return found


def holder(root: nn.Module, p: Projection) -> nn.Module:
    """The base's own module that holds ``p``'s weight, in a wrapped model."""
    return original(hung_at(root, p.module))
