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
        ranks[p.role.value, _layer(p.module)] += allocation.rank
    return dict(ranks)


def _layer(module: str) -> str:
    return next((part for part in module.split(".") if part.isdigit()), "–")
