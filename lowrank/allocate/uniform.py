"""The same rank everywhere: what LoRA does, and the yardstick of the others."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.allocate.base import Allocation, Request, Rule, allocations
from lowrank.allocate.budget import largest_ranks, uniform_cost
from lowrank.models.projections import Projection


@dataclass(frozen=True)
class Uniform(Rule):
    """Every projection gets the reference rank: with a budget, the largest equal rank that it pays for.

    A projection that cannot have that rank gets its largest. The scaling is the reference scaling everywhere.
    """

    def allocated(self, asked: Request) -> dict[Projection, Allocation]:
        """Raises ValueError where the budget is too small for ``rank`` in each projection."""
        price = uniform_cost(asked.projections, asked.cost, asked.rank)
        if asked.budget is not None and price > asked.budget:
            raise ValueError(
                f"a budget of {asked.budget:,} parameters is too small for rank {asked.rank} in each of "
                f"{len(asked.projections)} projections, which costs {price:,}"
            )
        ranks = [min(asked.rank, most) for most in largest_ranks(asked.projections, asked.cost)]
        return allocations(asked, ranks)
