"""Which adapters of a model act, how strongly, and for which examples.

What acts and what trains are two things: nothing here touches ``requires_grad``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank.adapters import adaptation, one_name, wrapped_root
from lowrank.layers.grouped import ExampleAdapters
from lowrank.layers.layer import AdaptedLayer
from lowrank.layers.linear import LoRALinear
from lowrank.layers.trained import TrainedModule
from lowrank.layers.tree import base_modules, hung_at, hung_by_name, without_copies
from lowrank.plan import Plan

Chosen = str | Iterable[str] | Mapping[str, float]


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
            adapter that trains modules in full. Of one with magnitudes (DoRA), which scale the whole output
            of a layer, a weight other than 1, or another adapter on one of its layers.
    """
    adaptation(model).acting.choose(*_checked(model, names))
    return model


def acting_adapters(model: nn.Module) -> dict[str, float]:
    """The names of the adapters that act now, each with the weight of its ΔW, as `set_adapters` takes them.

    Empty inside `disable_adapters`, and inside `adapters_for_rows`, where each example has its own. Raises
    ValueError where the model is not wrapped.
    """
    acting = adaptation(model).acting
    return {name: float(acting.weights.get(name, 1.0)) for name in acting.names}


@contextmanager
def use_adapters(model: nn.Module, names: Chosen) -> Iterator[nn.Module]:
    """`set_adapters` inside; what acted before acts again afterwards. Arguments and errors as there.

    With activation checkpointing call ``backward`` inside too: it runs the forward again.
    """
    chosen, weights = _checked(model, names)
    with _acting(model, chosen, weights):
        yield model


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, ``model`` is exactly the base model, modules trained in full included."""
    with use_adapters(model, ()):
        yield model


@contextmanager
def adapters_for_rows(
    model: nn.Module, names: Sequence[str | None], *, repeats: int = 1
) -> Iterator[nn.Module]:
    """Inside, each example of a batch has an adapter of its own, or none: for serving many at once.

    The output of each example is that of a run with its adapter alone, within rounding; that of None is the
    base's. Each projection makes one grouped product for the whole batch. Gradients reach the adapters of all
    examples, so that several can train in one step. Works in ``generate``; see ``repeats``.

    Where no graph is built, the factors in use are copied at the first call, and the copies kept until the
    end. With activation checkpointing call ``backward`` inside too: it runs the forward again.

    An adapted layer must get the batch as the leading dimension of its input, or an input of two dimensions
    with one row for each example; anything else raises ValueError when it runs, and names the layer.

    Args:
        names: the adapter of each example, in order; None for the base alone.
        repeats: a layer may also get each example so many times, one after the other. That is what
            transformers' ``generate`` makes of ``num_beams`` or ``num_return_sequences``.

    Raises:
        ValueError: an unknown name, one with magnitudes (DoRA), or one that trains modules in full or is
            adapted on the weight, which examples cannot have apart (all such modules are listed).
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"expected a list with the adapter of each example, got {names!r}")
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise ValueError(f"repeats: expected a whole number from 1 on, got {repeats!r}")
    used = {one_name(model, name) for name in names if name is not None}
    plans = adaptation(model).plans
    if dora := sorted(name for name in used if plans[name].dora):
        raise ValueError(
            f"{', '.join(dora)}: magnitudes (DoRA) scale the whole output, so such an adapter cannot act on "
            "some examples of a batch: run its examples apart, with use_adapters"
        )
    problems, paths = [], {}
    for path, hung in base_modules(wrapped_root(model)).items():
        layer = without_copies(hung)
        if isinstance(layer, LoRALinear):
            paths[id(layer)] = path
        elif isinstance(layer, AdaptedLayer):
            if shared := used.intersection(hung_by_name(layer)):
                kind = type(layer.base).__name__
                problems.append(f"{path}: {', '.join(sorted(shared))} adapts this {kind}")
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
    with _acting(model, (), {}, ExampleAdapters(names, paths, repeats)):
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
    if not isinstance(names, Iterable):
        raise ValueError(
            f"expected a name, several, or a mapping from names to weights, got {names!r}; () is none of them"
        )
    given = [names] if isinstance(names, str) else list(names)
    for name in given:
        one_name(model, name)
    weights = {}
    for name, weight in names.items() if isinstance(names, Mapping) else ():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not isfinite(weight):
            raise ValueError(f"expected a finite number as the weight of {name!r}, got {weight!r}")
        with torch.inference_mode(False):  # an inference tensor has no version, which layers look at
            weights[name] = torch.tensor(float(weight))  # not in fp64, which the compiler takes for a number
    return list(dict.fromkeys(given)), weights


def _check_magnitudes(plans: Mapping[str, Plan], name: str, weights: Mapping[str, float]) -> None:
    """Raises ValueError where ``name`` has magnitudes and is mixed with anything on a layer of its own."""
    if not plans[name].dora:
        return
    if weights[name] != 1:
        raise ValueError(
            f"the adapter {name!r} has magnitudes (DoRA), which cannot be weighted: expected weight 1, got "
            f"{weights[name]:.4g}"
        )
    own = {p.module for p in plans[name].adapted}
    for other in weights:
        shared = [p.module for p in plans[other].adapted if p.module in own]
        if other != name and shared:
            raise ValueError(
                f"{shared[0]} is adapted by {other!r} and by {name!r}, which has magnitudes (DoRA) and "
                "scales the whole output of a layer: only one of them can act; "
                "merge(model, one) makes it part of the base"
            )


def check_together(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Raises ValueError where these adapters cannot act together with these weights."""
    plans = adaptation(model).plans
    root = wrapped_root(model)
    for name, weight in weights.items():
        _check_magnitudes(plans, name, weights)
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
