"""What an allocator is: a frozen dataclass that turns a budget into ranks and scalings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from lowrank.plan import Allocation
from lowrank.projections import Projection
from lowrank.statistics import ProjectionStatistics


@runtime_checkable
class Allocator(Protocol):
    """Gives each projection a rank and a scaling.

    ``needs`` says which statistics must be measured first, as for an initializer.
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

        ``cost`` is what one rank of a projection takes; where ``budget`` is None it is what ``rank``
        would cost everywhere. ``alpha / rank`` is the scaling of a projection that gets ``rank``.
        """
        ...
