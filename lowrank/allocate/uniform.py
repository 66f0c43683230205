"""The same rank everywhere: what LoRA does, and the yardstick of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowrank.plan import Allocation
from lowrank.projections import Projection
from lowrank.statistics import ProjectionStatistics


@dataclass(frozen=True)
class Uniform:
    """Every projection gets ``rank``; with a budget, the largest equal rank that it pays for.

    Under a budget a projection too small for the common rank gets its ``min(in, out)``. The scaling
    is ``alpha / rank``.
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
        """Raises ValueError where ``rank`` exceeds a projection, or the budget is below one rank each."""
        if budget is None:
            for p in projections:
                if rank > min(p.shape):
                    raise ValueError(
                        f"rank {rank} is more than {p.name} of shape {p.shape} can have; "
                        f"choose at most {min(p.shape)}, or leave it out with exclude="
                    )
            return {p: Allocation(rank, alpha / rank) for p in projections}

        def price(equal: int) -> int:
            return sum(min(equal, *p.shape) * cost[p] for p in projections)

        if price(1) > budget:
            raise ValueError(
                f"a budget of {budget:,} parameters is too small for rank 1 in each of {len(projections)} "
                f"projections, which costs {price(1):,}"
            )
        low, high = 1, max(min(p.shape) for p in projections)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if price(middle) <= budget else (low, middle - 1)
        ranks = {p: min(low, *p.shape) for p in projections}
        return {p: Allocation(r, alpha / max(r, 1)) for p, r in ranks.items()}
