"""What an allocator is: a frozen dataclass that turns a budget into ranks and scalings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lowrank.calibration.statistics import ProjectionStatistics
from lowrank.models.projections import Projection


@dataclass(frozen=True)
class Allocation:
    """What one projection gets: ``rank`` (0: left alone) and the ``scaling`` of B·A."""

    rank: int
    scaling: float


@runtime_checkable
class Allocator(Protocol):
    """Gives each projection a rank and a scaling.

    ``needs`` says which statistics must be measured first, as for an initializer.

    An allocator may have an attribute ``unit``. Where it is ``"ranks"`` the allocator spends ``n · rank``
    ranks for n projections, whatever they cost, and a policy with a budget of parameters refuses it.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(
        self,
        projections: Sequence[Projection],
        *,
        rank: int,
        budget: int | None,
        alpha: float,
        cost: Mapping[Projection, int],
        statistics: Mapping[Projection, ProjectionStatistics] | None,
    ) -> Mapping[Projection, Allocation]:
        """Allocations for ``projections``, within ``budget`` trainable parameters.

        Planning resolves the arguments once, so that they mean the same for every allocator:

        Args:
            rank: the reference rank. It is the rank that the uniform allocation of ``budget`` gives.
            budget: trainable adapter parameters; where the policy has none, what ``rank`` costs everywhere.
                None, in a call by hand, means the latter too.
            alpha: so that ``alpha / rank`` is the reference scaling, whatever rule the policy chose for it
                (`Policy.scaling`). It does not depend on the rank that a projection gets.
            cost: trainable parameters that one rank of a projection takes. In planning it is a
                `lowrank.allocate.budget.Costs`, which also says the largest rank of each projection. A rank
                above that is cut to it after the call.
            statistics: what was measured, or None where ``needs`` is empty.
        """
        ...


@dataclass(frozen=True)
class Request:
    """What an allocator is called with: the arguments of `Allocator.__call__`."""

    projections: Sequence[Projection]
    rank: int
    budget: int | None
    alpha: float
    cost: Mapping[Projection, int]
    statistics: Mapping[Projection, ProjectionStatistics] | None


class Rule:
    """The call of this library's own allocators, said once: each says in `allocated` what it makes of it.

    Another library's allocator need not derive from it.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

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
        """See `Allocator`."""
        return self.allocated(Request(projections, rank, budget, alpha, cost, statistics))

    def allocated(self, asked: Request) -> dict[Projection, Allocation]:
        """Allocations for ``asked.projections``."""
        raise NotImplementedError


def allocations(
    asked: Request, ranks: Sequence[int], factors: Sequence[float] | None = None
) -> dict[Projection, Allocation]:
    """``ranks`` with the reference scaling ``alpha / rank``, times ``factors`` where they are given."""
    reference = asked.alpha / asked.rank
    factors = factors or [1.0] * len(ranks)
    return {
        p: Allocation(each, reference * factor)
        for p, each, factor in zip(asked.projections, ranks, factors, strict=True)
    }
