"""Two plans side by side: where one gives more rank than the other."""

from __future__ import annotations

from os import PathLike
from typing import Any

from lowrank.formats.layers import ranks_by_layer
from lowrank.plan import Plan
from lowrank.plots import by_layer


def compare_plans(a: Plan, b: Plan, path: str | PathLike[str] | None = None) -> Any:
    """A picture of the ranks of ``b`` minus those of ``a``, layer × role, as `Plan.plot` lays them out.

    A cell that is in one plan only counts as rank 0 in the other; one that is in neither is empty. The title
    has the trainable adapter parameters of both. Needs matplotlib. It is written to ``path``, whose ending
    says the format, where there is one, and the figure is returned.
    """
    first, second = ranks_by_layer(a), ranks_by_layer(b)
    cells = {cell: second.get(cell, 0) - first.get(cell, 0) for cell in {**first, **second}}
    title = f"b − a: {a.trainable_parameters:,} → {b.trainable_parameters:,} trainable adapter parameters"
    return by_layer(cells, path, title=title, signed=True)
