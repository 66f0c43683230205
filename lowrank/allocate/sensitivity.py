"""Rank where the loss is sensitive to the weight: TLoRA's allocation (2604.18124, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from lowrank.allocate.apportion import apportion
from lowrank.plan import Allocation
from lowrank.projections import Projection
from lowrank.statistics import ProjectionStatistics


@dataclass(frozen=True)
class Sensitivity:
    """Ranks in proportion to I = mean |W ⊙ ∇W|; a projection that the loss does not reach gets none.

    With ``unit="parameters"`` the budget is one of trainable parameters, spent to within one rank of
    the cheapest projection that can still grow. With ``unit="ranks"`` it is the authors' rule: n·rank
    ranks in all, whatever they cost, the rounding remainder to the most sensitive; what exceeds
    ``min(in, out)`` passes to the next.

    The scaling follows the authors' code as it acts: ``(alpha / rank) · max(1, n·I / ΣI)``, where rank
    is the uniform one.

    Args:
        unit: what the budget counts.
        floor: the least rank of a projection that the loss reaches (``unit="parameters"``).
    """

    unit: Literal["parameters", "ranks"] = "parameters"
    floor: int = 0

    needs = frozenset({"sensitivity"})

    def __post_init__(self) -> None:
        if self.unit not in ("parameters", "ranks"):
            raise ValueError(f'unit is "parameters" or "ranks", not {self.unit!r}')
        if self.floor < 0:
            raise ValueError(f"floor must not be negative: {self.floor}")

    def __call__(
        self,
        projections: Sequence[Projection],
        *,
        rank: int,
        budget: int | None,
        alpha: float,
        cost: Mapping[Projection, int],
        statistics: Mapping[Projection, ProjectionStatistics] | None,
    ) -> dict[Projection, Allocation]:
        """Raises ValueError without sensitivities, or where the budget is too small for one rank."""
        if statistics is None:
            raise ValueError("Sensitivity needs measured statistics: pass batches=")
        sensitivities = [_sensitivity(p, statistics) for p in projections]
        whole = sum(sensitivities)
        if not whole:
            raise ValueError("the loss is sensitive to none of the projections: it does not reach them")
        caps = [min(p.shape) for p in projections]
        if self.unit == "ranks":
            if budget is not None:
                raise ValueError('unit="ranks" spends n·rank ranks: give rank=, and leave budget=None')
            ranks = _by_ranks(sensitivities, caps, rank)
        else:
            costs = [cost[p] for p in projections]
            if budget is None:
                budget = sum(rank * each for each in costs)
            reached = [each for each, s in zip(costs, sensitivities, strict=True) if s]
            if budget < min(reached):
                raise ValueError(
                    f"a budget of {budget:,} parameters is too small for one rank anywhere: "
                    f"the cheapest costs {min(reached):,}"
                )
            ranks = apportion(sensitivities, costs, caps, budget, [self.floor] * len(caps))
        shares = [len(caps) * s / whole for s in sensitivities]
        return {
            p: Allocation(r, alpha / rank * max(1.0, share))
            for p, r, share in zip(projections, ranks, shares, strict=True)
        }


def _sensitivity(projection: Projection, statistics: Mapping[Projection, ProjectionStatistics]) -> float:
    measured = statistics[projection].sensitivity if projection in statistics else None
    if measured is None or not isfinite(measured):
        raise ValueError(f"{projection.name} has no measured sensitivity: {measured}")
    return measured


def _by_ranks(sensitivities: Sequence[float], caps: Sequence[int], rank: int) -> list[int]:
    n, whole = len(caps), sum(sensitivities)
    ranks = [round(n * rank * s / whole) for s in sensitivities]
    order = sorted(range(n), key=lambda i: (-sensitivities[i], i))
    remainder = n * rank - sum(ranks)
    for i in order:
        if sensitivities[i]:
            fitting = min(max(ranks[i] + remainder, 0), caps[i])
            remainder += ranks[i] - fitting
            ranks[i] = fitting
    return ranks
