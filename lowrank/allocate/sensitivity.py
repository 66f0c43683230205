"""Rank where the loss is sensitive to the weight: TLoRA's allocation (2604.18124, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from lowrank.allocate.base import Allocation, Request, Rule, allocations
from lowrank.allocate.budget import in_proportion, largest_ranks
from lowrank.calibration.statistics import ProjectionStatistics
from lowrank.models.projections import Projection


@dataclass(frozen=True)
class Sensitivity(Rule):
    """Ranks in proportion to I = mean |W ⊙ ∇W|; a projection that the loss does not reach gets none.

    With ``unit="parameters"`` the budget is one of trainable parameters. Each rank differs from its exact
    proportion by less than one, and what is left pays for no further rank of a projection that was rounded
    down (`apportion`). With ``unit="ranks"`` it is the authors' rule: n·rank ranks in all, whatever they
    cost, the rounding remainder to the most sensitive; what exceeds a projection's largest rank passes to the
    next.

    The scaling follows the authors' code as it acts: ``s · max(1, n·I / ΣI)``, where s is the reference
    scaling (``alpha / rank``, or what `Policy.scaling` says, for the reference rank) and n the number of
    projections.

    Args:
        unit: what the budget counts.
        floor: the least rank of a projection that the loss reaches (``unit="parameters"``).
    """

    unit: Literal["parameters", "ranks"] = "parameters"
    floor: int = 0

    needs = frozenset({"sensitivity"})

    def __post_init__(self) -> None:
        if self.unit not in ("parameters", "ranks"):
            raise ValueError(f'unit: expected "parameters" or "ranks", got {self.unit!r}')
        if self.floor < 0:
            raise ValueError(f"floor: expected zero or more, got {self.floor}")

    def allocated(self, asked: Request) -> dict[Projection, Allocation]:
        """Raises ValueError without sensitivities, or where the budget is too small for one rank."""
        if asked.statistics is None:
            raise ValueError("Sensitivity needs measured statistics: pass batches=")
        sensitivities = [_sensitivity(p, asked.statistics) for p in asked.projections]
        whole = sum(sensitivities)
        if not whole:
            raise ValueError("all sensitivities are zero: the loss does not depend on any of the projections")
        if self.unit == "ranks":
            ranks = _by_ranks(sensitivities, largest_ranks(asked.projections, asked.cost), asked.rank)
        else:
            ranks = in_proportion(asked, sensitivities, floor=self.floor)
        return allocations(asked, ranks, [max(1.0, len(sensitivities) * s / whole) for s in sensitivities])


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
