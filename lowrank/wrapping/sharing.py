"""One adapter for all experts of a tensor, where the policy asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lowrank.linalg.rows import Rows, shifted
from lowrank.models.experts import stack_of, within_experts
from lowrank.models.projections import Projection
from lowrank.policy import Policy


def shared_experts(
    model: nn.Module, projections: Sequence[Projection], policy: Policy
) -> tuple[list[Projection], list[str]]:
    """The projections, those of a tensor's experts as one, and a note on them; as they are with "each".

    Raises:
        ValueError: experts that are modules of their own, or a target that leaves out some of a tensor.
    """
    if policy.experts == "each":
        return list(projections), []
    made: dict[tuple[str, str, Rows], Projection] = {}
    counts: dict[tuple[str, str, Rows], int] = {}
    for p in projections:
        stack = stack_of(model.get_submodule(p.module), p.param)
        if stack is None and within_experts(model, p.module, p.param):
            raise ValueError(
                f'experts="shared" needs the experts in one tensor, and {p.name} is a module of its own: '
                'use experts="each", or leave the experts out with exclude='
            )
        expert = p.rows[0] // stack.out if stack else 0
        key = p.module, p.param, shifted(p.rows, -expert * stack.out if stack else 0)
        counts[key] = counts.get(key, 0) + 1
        if stack is not None and stack.experts > 1:
            p = replace(p, rows=key[2], block=f"shared.{p.block.partition('.')[2]}", shared=stack.experts)
        made[key] = p
    for key, p in made.items():
        if counts[key] != p.shared:
            raise ValueError(
                f"{p.name}: an adapter that experts share acts on all {p.shared} of the tensor, and the "
                f'target names {counts[key]}: name all, or use experts="each"'
            )
    shared = [p for p in made.values() if p.shared > 1]
    if not shared:
        return list(made.values()), ['experts="shared": no targeted weight is a tensor of experts']
    many = " or ".join(map(str, sorted({p.shared for p in shared})))
    return list(made.values()), [f"{len(shared)} projections: one adapter for all {many} experts"]
