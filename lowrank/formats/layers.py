"""A plan's ranks by role and layer, as its heat map shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from lowrank.allocate.base import Allocation
from lowrank.models.projections import Projection


def ranks_by_layer(plan: Mapping[Projection, Allocation]) -> dict[tuple[str, str], int]:
    """(role, layer) → the sum of the ranks there."""
    ranks: Counter[tuple[str, str]] = Counter()
    for p, allocation in plan.items():
        ranks[p.role.value, layer_of(p)] += allocation.rank
    return dict(ranks)


def layer_of(projection: Projection) -> str:
    """The first number in its module's path; "–" where there is none."""
    return next((part for part in projection.module.split(".") if part.isdigit()), "–")
