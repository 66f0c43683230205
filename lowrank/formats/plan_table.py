"""A plan as cells and lines of text: what printing shows, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowrank.models.listing import listed


def plan_cells(plan: Any) -> list[list[str]]:
    """The header, then a line for each projection of a `Plan`; energies where it has some."""
    whole = plan.budget or _spent(plan)
    header = ["projection", "role", "out × in", "rank", "scaling", "parameters", "share"]
    lines = [[*header, "energy"] if plan.energies else header]
    for p, allocation in plan.items():
        line = [p.name, p.role.value, f"{p.out_features} × {p.in_features}", str(allocation.rank)]
        if allocation.rank:
            spent = plan.parameters(p)
            line += [f"{allocation.scaling:.4g}", f"{spent:,}", f"{spent / whole:.1%}"]
        else:
            line += ["–", "0", "left alone"]
        if plan.energies:
            line.append(f"{plan.energies[p]:.4f}" if p in plan.energies else "–")
        lines.append(line)
    return lines


def plan_total(plan: Any) -> str:
    """What the projections of a `Plan` cost together, of which budget, and the reference rank."""
    spent = _spent(plan)
    total = f"{spent:,} trainable adapter parameters"
    if plan.budget is not None:
        left = plan.budget - spent
        total += f" of a budget of {plan.budget:,}" + (f" ({left:,} left)" if left else "")
    return total + ("" if plan.reference_rank is None else f", reference rank {plan.reference_rank}")


def plan_remarks(plan: Any) -> list[str]:
    """The lines below the table: the total first, then what the rows do not show."""
    lines = [plan_total(plan)]
    if plan.dora:
        lines.append("DoRA: a magnitude for each output row is among the parameters")
    lines += [f"rows trained: {each}, {each.parameters:,} parameters" for each in plan.rows]
    if plan.train:
        lines.append(f"trained in full: {', '.join(plan.train)}")
    if plan.learning_rate is not None:
        lines.append(f"learning rate {plan.learning_rate:.2e}, measured")
    if [*plan.matches] != ["target='all-linear'"]:
        lines += [f"{spelled}: {_counted(plan, hits)}" for spelled, hits in plan.matches.items()]
    return lines + [f"note: {note}" for note in plan.notes]


def _counted(plan: Any, hits: Sequence[Any]) -> str:
    return f"{len(hits)} of {len(plan)} projections ({listed(p.name for p in hits)})" if hits else "none"


def _spent(plan: Any) -> int:
    return sum(map(plan.parameters, plan))
