"""Several processes adapt their copies of a base as one: the same plan, and the same factors to the bit.

A seed and summed statistics make them the same already where all processors are of one kind. Others round
otherwise, and a singular vector may come with the other sign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain

from torch import nn

from lowrank.batches import model_device
from lowrank.layers.adapter import Adapter
from lowrank.models.projections import Projection
from lowrank.plan import Plan
from lowrank.processes import Processes

Made = tuple[Plan, dict[Projection, Adapter]]


def agreed(model: nn.Module, make: Callable[[], Made]) -> Made:
    """``make()``, which every process calls; the adapters get the values of rank 0.

    Raises:
        ValueError: the plans differ, or ``make`` raised one in another process.
        RuntimeError: ``make`` raised something else in another process.
    """
    processes = Processes(model_device(model))
    if processes.number == 1:
        return make()
    made, error = None, None
    try:
        made = make()
    except Exception as raised:
        error = raised
    processes.raise_in_all(error, "adapting the model")
    assert made is not None
    plan, adapters = made
    _check_same(processes.gathered(_decisions(plan)))
    for adapter in adapters.values():
        processes.take_first(chain(adapter.parameters(), adapter.buffers()))
    return made


def _decisions(plan: Plan) -> dict[str, object]:
    """What the processes must agree on, by what it is about."""
    decided: dict[str, object] = {p.name: (plan[p].rank, plan[p].scaling) for p in plan}
    decided |= {"modules trained in full": plan.train, "rows trained": plan.rows}
    return {**decided, "dropout": plan.dropout, "dora": plan.dora}


def _check_same(everyone: list[Mapping[str, object]]) -> None:
    """Raises ValueError, the same in all processes, where one has decided otherwise than rank 0."""
    first = everyone[0]
    for rank, other in enumerate(everyone):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            name = names[0]
            raise ValueError(
                f"the processes made different plans: for {name}, rank 0 has {first.get(name)} and rank "
                f"{rank} has {other.get(name)} ({len(names)} differences): give every process the same model "
                "and policy, or plan once, plan.save(path), and pass Plan.load(path) as the policy"
            )
