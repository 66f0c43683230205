"""The same rank everywhere: what LoRA does, and the yardstick of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowrank.allocate.base import Allocation, allocations
from lowrank.allocate.budget import largest_ranks, uniform_cost
from lowrank.calibration.statistics import ProjectionStatistics
from lowrank.models.projections import Projection


@dataclass(frozen=True)
class Uniform:
    """Every projection gets the reference rank: with a budget, the largest equal rank that it pays for.

    A projection that cannot have that rank gets its largest. The scaling is the reference scaling everywhere.
    """

    needs = frozenset[str]()

    def __call__(
        self,
        projections: Sequence[Projection],
        *,
        rank: int,
        budget: int | None,
        alpha: float,
        cost: Mapping[Projection, int],
        statistics: Mapping[Projection, ProjectionStatistics] | None = None,
    ) -> dict[Projection, Allocation]:
        """Raises ValueError where the budget is too small for ``rank`` in each projection."""
        price = uniform_cost(projections, cost, rank)
        if budget is not None and price > budget:
            raise ValueError(
                f"a budget of {budget:,} parameters is too small for rank {rank} in each of "
                f"{len(projections)} projections, which costs {price:,}"
            )
        ranks = [min(rank, most) for most in largest_ranks(projections, cost)]
        return allocations(projections, ranks, rank=rank, alpha=alpha)
