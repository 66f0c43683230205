"""A budget of trainable adapter parameters: what it pays for, when it is too small, and what is left of it.

The one place where budgets are resolved and checked. How a budget is divided is the allocators' affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lowrank.allocate.apportion import apportion
from lowrank.allocate.base import Allocation, Request
from lowrank.models.projections import Projection
from lowrank.notices import few


class Costs(dict[Projection, int]):
    """Projection → trainable parameters of one rank; ``largest`` says the largest rank that it can have."""

    def __init__(self, costs: Mapping[Projection, int], largest: Mapping[Projection, int]) -> None:
        super().__init__(costs)
        self.largest = dict(largest)


def largest_ranks(projections: Sequence[Projection], cost: Mapping[Projection, int]) -> list[int]:
    """The largest rank of each projection: as ``cost`` says it, or ``min(out, in)``."""
    largest = cost.largest if isinstance(cost, Costs) else {}
    return [largest.get(p, min(p.shape)) for p in projections]


def uniform_cost(projections: Sequence[Projection], cost: Mapping[Projection, int], rank: int) -> int:
    """Parameters of ``rank`` in each projection, or of the largest that it can have where that is less."""
    largest = largest_ranks(projections, cost)
    return sum(min(rank, most) * cost[p] for p, most in zip(projections, largest, strict=True))


def spendable(asked: Request) -> int:
    """The budget, or what the rank costs everywhere where there is none."""
    if asked.budget is not None:
        return asked.budget
    return uniform_cost(asked.projections, asked.cost, asked.rank)


def reference_rank(projections: Sequence[Projection], cost: Mapping[Projection, int], budget: int) -> int:
    """The rank that the uniform allocation of ``budget`` gives: the largest equal one, and at least 1."""
    low, high = 1, max(1, *largest_ranks(projections, cost))
    while low < high:
        middle = (low + high + 1) // 2
        fits = uniform_cost(projections, cost, middle) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def check_affordable(budget: int, costs: Iterable[int]) -> None:
    """Raises ValueError where ``budget`` is below each of ``costs``, which are those of one rank."""
    cheapest = min(costs)
    if budget < cheapest:
        raise ValueError(
            f"a budget of {budget:,} parameters is too small for one rank anywhere: "
            f"the cheapest costs {cheapest:,}"
        )


def in_proportion(asked: Request, shares: Sequence[float], *, floor: int = 0) -> list[int]:
    """Ranks in proportion to ``shares``, as `apportion` guarantees it; a share gets ``floor`` or more.

    Raises:
        ValueError: the budget is too small for one rank anywhere or for the floors, or nothing can have rank.
    """
    budget = spendable(asked)
    costs = [asked.cost[p] for p in asked.projections]
    caps = largest_ranks(asked.projections, asked.cost)
    payable = [each for each, cap, share in zip(costs, caps, shares, strict=True) if cap and share]
    if not payable:
        raise ValueError("the projections that should get rank can have none")
    check_affordable(budget, payable)
    # A projection that can have no rank has no part in the proportions.
    shares = [share if cap else 0.0 for share, cap in zip(shares, caps, strict=True)]
    return apportion(shares, costs, caps, budget, [floor] * len(caps))


# -- what a plan should say of it -----------------------------------------------------------------------


def limits(projections: Sequence[Projection], cost: Costs, rank: int, initializer: object) -> list[str]:
    """Sentences on the projections that cannot have the reference rank."""
    none = [p.name for p in projections if not cost.largest[p]]
    less = [f"{p.name} ({cost.largest[p]})" for p in projections if 0 < cost.largest[p] < rank]
    notes = []
    if none:
        notes.append(
            f"{_projections(none)} left alone, since {initializer!r} can make no rank there: {few(none, 3)}"
        )
    if less:
        notes.append(f"{_projections(less)} limited to less than the reference rank {rank}: {few(less, 3)}")
    return notes


def unspent(
    allocations: Mapping[Projection, Allocation], cost: Costs, budget: int, allocator: object
) -> list[str]:
    """A sentence on what is left of ``budget``, and why, where something is."""
    left = budget - sum(allocation.rank * cost[p] for p, allocation in allocations.items())
    if left <= 0:
        return []
    growing = [cost[p] for p, allocation in allocations.items() if allocation.rank < cost.largest[p]]
    if not growing:
        why = "every projection has the largest rank that it can have"
    elif min(growing) > left:
        why = f"one more rank costs {min(growing):,} or more"
    else:
        why = f"{allocator!r} raises no rank further"
    return [f"{left:,} parameters of the budget of {budget:,} are left: {why}"]


def _projections(names: Sequence[str]) -> str:
    return "1 projection is" if len(names) == 1 else f"{len(names)} projections are"
