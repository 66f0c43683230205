"""Rank by the weights' own spectra: no data is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lowrank.allocate.apportion import apportion
from lowrank.plan import Allocation
from lowrank.projections import Projection
from lowrank.statistics import ProjectionStatistics


@dataclass(frozen=True)
class StableRank:
    """Ranks in proportion to the stable rank ``‖W‖²_F / σ₁²``: more where a weight's energy is spread out.

    A zero weight gets none. The budget is one of trainable parameters, spent as `Sensitivity` spends it; the
    scaling is ``alpha / rank`` for the uniform rank.
    """

    needs = frozenset({"spectrum"})

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
        """Raises ValueError where all weights are zero, or the budget is too small for one rank."""
        shares = [_stable_rank(s) for s in _spectra(projections, statistics)]
        return _spent(projections, shares, rank, budget, alpha, cost)


@dataclass(frozen=True)
class EnergyRank:
    """Ranks in proportion to how many singular values hold ``share`` of a weight's energy ``‖W‖²_F``.

    Otherwise as `StableRank`, which the largest singular value alone can decide.
    """

    share: float = 0.9

    needs = frozenset({"spectrum"})

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1: {self.share}")

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
        """Raises ValueError where all weights are zero, or the budget is too small for one rank."""
        shares = [_count(s, self.share) for s in _spectra(projections, statistics)]
        return _spent(projections, shares, rank, budget, alpha, cost)


def _stable_rank(spectrum: Tensor) -> float:
    return float((spectrum / spectrum[0]).square().sum()) if spectrum[0] > 0 else 0.0


def _count(spectrum: Tensor, share: float) -> float:
    energy = spectrum.square().cumsum(0)
    return float((energy < share * energy[-1]).sum() + 1) if energy[-1] > 0 else 0.0


def _spectra(
    projections: Sequence[Projection], statistics: Mapping[Projection, ProjectionStatistics] | None
) -> list[Tensor]:
    spectra = [None if statistics is None else statistics[p].spectrum for p in projections]
    if any(spectrum is None for spectrum in spectra):
        raise ValueError("the weights' spectra were not measured: give statistics with them")
    return [spectrum for spectrum in spectra if spectrum is not None]


def _spent(
    projections: Sequence[Projection],
    shares: Sequence[float],
    rank: int,
    budget: int | None,
    alpha: float,
    cost: Mapping[Projection, int],
) -> dict[Projection, Allocation]:
    costs = [cost[p] for p in projections]
    if budget is None:
        budget = sum(rank * each for each in costs)
    payable = [each for each, share in zip(costs, shares, strict=True) if share]
    if not payable:
        raise ValueError("all the weights are zero: nothing tells their ranks")
    if budget < min(payable):
        raise ValueError(
            f"a budget of {budget:,} parameters is too small for one rank anywhere: "
            f"the cheapest costs {min(payable):,}"
        )
    ranks = apportion(shares, costs, [min(p.shape) for p in projections], budget)
    return {p: Allocation(r, alpha / rank) for p, r in zip(projections, ranks, strict=True)}
