"""Rank where the inputs' variance is: EVA's redistribution (2410.07170, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lowrank.allocate.base import Allocation, Request, Rule, allocations
from lowrank.allocate.budget import check_affordable, largest_ranks, spendable
from lowrank.calibration.statistics import ProjectionStatistics
from lowrank.models.projections import Projection


@dataclass(frozen=True)
class ExplainedVariance(Rule):
    """Each next rank goes where its principal direction explains the largest share of an input's variance.

    With ``unit="parameters"`` ranks are bought until the budget of trainable parameters affords no other;
    with ``unit="ranks"``, as the authors do, until n·rank are spent. No projection gets more than
    ``rho · rank``, where rank is the reference rank: the policy's, or what the uniform allocation of its
    budget gives. The scaling is the reference scaling, whatever rank a projection gets.

    Args:
        rho: how far one projection may exceed the reference rank.
        unit: what the budget counts.
    """

    rho: float = 2.0
    unit: Literal["parameters", "ranks"] = "parameters"

    needs = frozenset({"moment"})

    def __post_init__(self) -> None:
        if not self.rho >= 1:
            raise ValueError(f"rho: expected at least 1, got {self.rho}")
        if self.unit not in ("parameters", "ranks"):
            raise ValueError(f'unit: expected "parameters" or "ranks", got {self.unit!r}')

    def allocated(self, asked: Request) -> dict[Projection, Allocation]:
        """Raises ValueError without moments, where no input varies, or for a budget below one rank."""
        if asked.statistics is None:
            raise ValueError("ExplainedVariance needs measured statistics: pass batches=")
        projections = asked.projections
        if self.unit == "ranks":
            price: Mapping[Projection, int] = dict.fromkeys(projections, 1)
            left = len(projections) * asked.rank
        else:
            price, left = asked.cost, spendable(asked)
        limits = [min(int(self.rho * asked.rank), most) for most in largest_ranks(projections, asked.cost)]
        shares = _explained(projections, asked.statistics, limits)
        if not any(shares.values()):
            raise ValueError("the inputs of all projections are constant, so no ranks follow from them")
        check_affordable(left, [price[p] for p in projections if shares[p]])
        offers = [(share, -i, k) for i, p in enumerate(projections) for k, share in enumerate(shares[p])]
        ranks = dict.fromkeys(projections, 0)
        for _, i, _ in sorted(offers, key=lambda offer: (-offer[0], -offer[1], offer[2])):
            p = projections[-i]
            if price[p] <= left:
                ranks[p] += 1
                left -= price[p]
        return allocations(asked, list(ranks.values()))


def _explained(
    projections: Sequence[Projection],
    statistics: Mapping[Projection, ProjectionStatistics],
    limits: Sequence[int],
) -> dict[Projection, list[float]]:
    """Shares of variance by direction, descending, up to each limit; none where the input does not vary."""
    by_input: dict[int, torch.Tensor] = {}  # projections that read one input share its covariance
    shares = {}
    for p, limit in zip(projections, limits, strict=True):
        covariance = statistics[p].token_covariance if p in statistics else None
        if covariance is None:
            raise ValueError(f"{p.name} has no measured moment")
        if id(covariance) not in by_input:
            by_input[id(covariance)] = torch.linalg.eigvalsh(covariance.double()).flip(0).clamp_min(0)
        values = by_input[id(covariance)]
        total = float(values.sum())
        shares[p] = [v / total for v in values[:limit].tolist() if v > 0] if total > 0 else []
    return shares
