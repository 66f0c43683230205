"""A model with adapters in it: finding them.

What is in a model is read from the model. Putting adapters in is `wrapping.install`'s affair, taking them out
`merging`'s, and which of them act is `choosing`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from lowrank.layers.acting import Acting
from lowrank.layers.adapter import Adapter
from lowrank.layers.expert_stack import ExpertStack, trained_within
from lowrank.layers.layer import AdaptedLayer
from lowrank.layers.offsets import TokenOffsets
from lowrank.layers.trained import TrainedModule
from lowrank.layers.tree import hung_at, hung_by_name, original, without_copies
from lowrank.layers.weight import AdaptedWeight, WeightAdapters
from lowrank.linalg.rows import Rows
from lowrank.models.fingerprint import Sample
from lowrank.models.projections import Projection
from lowrank.plan import Plan


@dataclass(frozen=True)
class Adaptation:
    """What was done to a model, kept on it as ``_lowrank``: enough to undo it and to save it."""

    plans: dict[str, Plan]  # by adapter name, in the order in which they were added
    acting: Acting  # which all its layers share
    required_grad: frozenset[str]  # parameters that required grad before, by their names then
    buffers: Mapping[str, Sample]  # of the base, as they were then


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
    """The names of the adapters in ``model``, in the order in which they were added; none of a plain base."""
    if not any("_lowrank" in module.__dict__ for module in model.modules()):
        return []
    return list(adaptation(model).plans)


def one_name(model: nn.Module, name: str | None) -> str:
    """``name``, or where it is None that of the only adapter; raises ValueError where that is no answer."""
    names = list(adaptation(model).plans)
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
    """The adapted modules by path: `AdaptedLayer`s, and modules adapted on the weight."""
    kinds: Any = (AdaptedLayer, AdaptedWeight)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def adapter_parameters(
    model: nn.Module, name: str | None = None, *, train: bool = False
) -> Iterator[nn.Parameter]:
    """What the adapter ``name`` trains, whether it acts or not, and also while it is frozen.

    Without a name: what all adapters train. Modules trained in full (``Policy(train=...)``) are among it with
    ``train=True``, and else not. Raises ValueError where there is no adapter of that name.
    """
    if name is not None:
        one_name(model, name)
    seen: set[nn.Parameter] = set()  # rows that a head shares with its embedding hang in both
    for module in model.modules():
        if isinstance(module, WeightAdapters) or (isinstance(module, TrainedModule) and not train):
            continue  # the former by the module that holds it
        for owner, held in hung_by_name(module).items():
            if name in (None, owner):
                trained = held.parameters() if isinstance(module, TrainedModule) else trained_within(held)
                for parameter in trained:
                    if parameter not in seen:
                        seen.add(parameter)
                        yield parameter


def added_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter that wrapping put beside the base's, frozen or not."""
    for module in model.modules():
        if isinstance(module, (Adapter, ExpertStack, TokenOffsets, TrainedModule)):
            yield from (module.copies if isinstance(module, TrainedModule) else module).parameters()


def adapters_of(model: nn.Module, name: str | None = None) -> dict[Projection, Adapter]:
    """Projection → its adapter, in the plan's order, of the adapter ``name`` of the wrapped ``model``."""
    root, name = wrapped_root(model), one_name(model, name)
    found: dict[Projection, Adapter] = {}
    by_weight: dict[tuple[str, str], dict[Rows, Adapter]] = {}
    for p in plan_of(root, name).adapted:
        place = p.module, p.param
        if place not in by_weight:
            module = without_copies(hung_at(root, p.module))
            if isinstance(module, AdaptedWeight):
                held = module.lora.of(name, p.param)
            else:
                held = cast(AdaptedLayer, module).part(name).held()
            by_weight[place] = {adapter.rows: adapter for adapter in held}
        found[p] = by_weight[place][p.rows]
    return found


def holder(root: nn.Module, p: Projection) -> nn.Module:
    """The base's own module that holds ``p``'s weight, in a wrapped model."""
    return original(hung_at(root, p.module))
