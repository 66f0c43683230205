"""Rank by the weights' own spectra: no data is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lowrank.allocate.base import Allocation, allocations
from lowrank.allocate.budget import in_proportion
from lowrank.calibration.statistics import ProjectionStatistics
from lowrank.models.projections import Projection


@dataclass(frozen=True)
class StableRank:
    """Ranks in proportion to the stable rank ``‖W‖²_F / σ₁²``: more where a weight's energy is spread out.

    A zero weight gets none. The budget is one of trainable parameters, spent as `Sensitivity` spends it; the
    scaling is the reference scaling everywhere.
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
    found = []
    for p in projections:
        spectrum = statistics[p].spectrum if statistics is not None and p in statistics else None
        if spectrum is None:
            raise ValueError(
                f"{p.name}: the spectrum of its weight was not measured: give statistics that hold it"
            )
        found.append(spectrum)
    return found


def _spent(
    projections: Sequence[Projection],
    shares: Sequence[float],
    rank: int,
    budget: int | None,
    alpha: float,
    cost: Mapping[Projection, int],
) -> dict[Projection, Allocation]:
    if not any(shares):
        raise ValueError("all the weights are zero: nothing tells their ranks")
    ranks = in_proportion(projections, shares, rank=rank, budget=budget, cost=cost)
    return allocations(projections, ranks, rank=rank, alpha=alpha)
