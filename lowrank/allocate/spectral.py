"""Rank by the weights' own spectra: no data is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lowrank.allocate.base import Allocation, Request, Rule, allocations
from lowrank.allocate.budget import in_proportion
from lowrank.models.projections import Projection


@dataclass(frozen=True)
class StableRank(Rule):
    """Ranks in proportion to the stable rank ``‖W‖²_F / σ₁²``: more where a weight's energy is spread out.

    A zero weight gets none. The budget is one of trainable parameters, spent as `Sensitivity` spends it; the
    scaling is the reference scaling everywhere.
    """

    needs = frozenset({"spectrum"})

    def allocated(self, asked: Request) -> dict[Projection, Allocation]:
        """Raises ValueError where all weights are zero, or the budget is too small for one rank."""
        return _spent(asked, [_stable_rank(spectrum) for spectrum in _spectra(asked)])


@dataclass(frozen=True)
class EnergyRank(Rule):
    """Ranks in proportion to how many singular values hold ``share`` of a weight's energy ``‖W‖²_F``.

    Otherwise as `StableRank`, which the largest singular value alone can decide.
    """

    share: float = 0.9

    needs = frozenset({"spectrum"})

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share: expected a number between 0 and 1, got {self.share}")

    def allocated(self, asked: Request) -> dict[Projection, Allocation]:
        """Raises ValueError where all weights are zero, or the budget is too small for one rank."""
        return _spent(asked, [_count(spectrum, self.share) for spectrum in _spectra(asked)])


def _stable_rank(spectrum: Tensor) -> float:
    return float((spectrum / spectrum[0]).square().sum()) if spectrum[0] > 0 else 0.0


def _count(spectrum: Tensor, share: float) -> float:
    energy = spectrum.square().cumsum(0)
    return float((energy < share * energy[-1]).sum() + 1) if energy[-1] > 0 else 0.0


def _spectra(asked: Request) -> list[Tensor]:
    found = []
    for p in asked.projections:
        measured = asked.statistics[p] if asked.statistics is not None and p in asked.statistics else None
        if measured is None or measured.spectrum is None:
            raise ValueError(
                f"{p.name}: the spectrum of its weight was not measured: pass statistics= that contain it"
            )
        found.append(measured.spectrum)
    return found


def _spent(asked: Request, shares: Sequence[float]) -> dict[Projection, Allocation]:
    if not any(shares):
        raise ValueError("all weights are zero, so no ranks follow from them")
    return allocations(asked, in_proportion(asked, shares))
