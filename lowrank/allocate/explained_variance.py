"""Rank where the inputs' variance is: EVA's redistribution (2410.07170, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lowrank.plan import Allocation
from lowrank.projections import Projection
from lowrank.statistics import ProjectionStatistics


@dataclass(frozen=True)
class ExplainedVariance:
    """Each next rank goes where its principal direction explains the largest share of an input's variance.

    With ``unit="parameters"`` ranks are bought until the budget of trainable parameters affords no other;
    with ``unit="ranks"``, as the authors do, until n·rank are spent. No projection gets more than
    ``rho · rank``. The scaling is ``alpha / rank`` for the uniform rank, whatever a projection gets.

    Args:
        rho: how far one projection may exceed the uniform rank.
        unit: what the budget counts.
    """

    rho: float = 2.0
    unit: Literal["parameters", "ranks"] = "parameters"

    needs = frozenset({"moment"})

    def __post_init__(self) -> None:
        if not self.rho >= 1:
            raise ValueError(f"rho must be at least 1: {self.rho}")
        if self.unit not in ("parameters", "ranks"):
            raise ValueError(f'unit is "parameters" or "ranks", not {self.unit!r}')

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
        """Raises ValueError without moments, or where the budget is too small for one rank."""
        if statistics is None:
            raise ValueError("ExplainedVariance needs measured statistics: pass batches=")
        if self.unit == "ranks" and budget is not None:
            raise ValueError('unit="ranks" spends n·rank ranks: give rank=, and leave budget=None')
        price = dict.fromkeys(projections, 1) if self.unit == "ranks" else cost
        left = sum(rank * price[p] for p in projections) if budget is None else budget
        most = max(rank, int(self.rho * rank))
        shares = _explained(projections, statistics, most)
        offers = [(share, -i, k) for i, p in enumerate(projections) for k, share in enumerate(shares[p])]
        ranks = dict.fromkeys(projections, 0)
        for _, i, _ in sorted(offers, key=lambda offer: (-offer[0], -offer[1], offer[2])):
            p = projections[-i]
            if price[p] <= left:
                ranks[p] += 1
                left -= price[p]
        if not any(ranks.values()):
            raise ValueError(
                f"a budget of {left:,} parameters is too small for one rank anywhere: "
                f"the cheapest costs {min(price.values()):,}"
            )
        return {p: Allocation(r, alpha / rank) for p, r in ranks.items()}


def _explained(
    projections: Sequence[Projection], statistics: Mapping[Projection, ProjectionStatistics], most: int
) -> dict[Projection, list[float]]:
    """Shares of variance by direction, descending; none where the input does not vary."""
    by_input: dict[int, torch.Tensor] = {}  # projections that read one input share its covariance
    shares = {}
    for p in projections:
        covariance = statistics[p].token_covariance
        if covariance is None:
            raise ValueError(f"{p.name} has no measured moment")
        if id(covariance) not in by_input:
            by_input[id(covariance)] = torch.linalg.eigvalsh(covariance.double()).flip(0).clamp_min(0)
        values = by_input[id(covariance)]
        total = float(values.sum())
        cap = min(most, *p.shape)
        shares[p] = [v / total for v in values[:cap].tolist() if v > 0] if total > 0 else []
    return shares
