"""What of a wrapped model PEFT has a place for. It raises, and writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lowrank.adapters import plan_of
from lowrank.layers.adapter import Adapter
from lowrank.layers.layer import AdaptedLayer
from lowrank.layers.tree import hung_at, state_as, without_copies
from lowrank.models.experts import Stack, stack_of
from lowrank.models.projections import Projection, on_weight
from lowrank.peft_format.config import PeftConfig
from lowrank.peft_format.experts import Experts, experts_in, place_of
from lowrank.peft_format.experts import problem as expert_problem
from lowrank.peft_format.factors import factor_problem
from lowrank.peft_format.folder import ancestors, base_paths, places
from lowrank.peft_format.tokens import peft_problems
from lowrank.wrapping.unused import layers_only_read


def adapted_experts(root: nn.Module, adapters: Iterable[Projection]) -> dict[str, Experts]:
    """The tensors of experts that are adapted, by their names."""
    named = frozenset(place_of(p) for p in adapters if _stack(root, p))
    return experts_in(root, PeftConfig(parameters=named)) if named else {}


def _stack(root: nn.Module, p: Projection) -> Stack | None:
    return stack_of(without_copies(hung_at(root, p.module)), p.param)


def check_exportable(
    root: nn.Module, adapters: Mapping[Projection, Adapter], name: str, experts: Mapping[str, Experts]
) -> None:
    """Raises ValueError where an export has no place for an adapter; ``experts`` are those that it has."""
    problems, counts = [], places(root)
    only_read = layers_only_read(root, name)
    for p in adapters:
        hung = hung_at(root, p.module)
        module: Any = without_copies(hung)
        if place_of(p) in experts:
            if problem := expert_problem(experts[place_of(p)]):
                problems.append(f"{p.name}: {problem}")
            elif counts[hung] > 1:
                problems.append(f"{p.name}: it is used in several places, of which PEFT would adapt one")
        elif on_weight(root, p) or p.module in only_read:
            problems.append(
                f"{p.name}: its weight is read without a call, where PEFT's layers have no effect"
            )
        elif problem := factor_problem(module.base):
            problems.append(f"{p.name}: {problem}")
        elif counts[hung] > 1:
            problems.append(f"{p.name}: it is used in several places, of which PEFT would adapt one")
    problems += peft_problems(root, plan_of(root, name).rows, {p.module for p in adapters})
    if problems:
        advice = "adapt the model without them (exclude=), or merge(model) and save the whole of it"
        raise ValueError(f"PEFT has no place for these adapters; {advice}:\n  " + "\n  ".join(problems))


# -- modules trained in full ---------------------------------------------------------------------------


def trained_states(root: nn.Module, name: str) -> dict[str, dict[str, Tensor]]:
    """The states of the modules that PEFT will want from the file, by path.

    PEFT compares the ends of strings: "classifier" names a ``pre_classifier`` too, whose weights are then
    written as the base has them.
    """
    train = plan_of(root, name).train
    paths = base_paths(root)
    taken = sorted(path for path in paths if path.endswith(train)) if train else []
    problems, states, hung = [], {}, places(root)
    for path in taken:
        module = paths[path]
        own = [each for each in module.modules() if isinstance(each, AdaptedLayer) and name in each.adapters]
        if own:
            problems.append(f"{path}: it holds adapters, and PEFT would train it in full, going by its name")
        elif any(above in states for above in ancestors(path)):
            problems.append(f"{path}: it lies inside another module that PEFT would train in full")
        elif hung[module] > 1:
            problems.append(f"{path}: it is used in several places, of which PEFT would train one")
        states[path] = state_as(module, name)
    if problems:
        raise ValueError("PEFT cannot keep these modules trained in full apart:\n  " + "\n  ".join(problems))
    return states
