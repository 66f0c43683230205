"""Makes one adapter of several: their weighted sum, exactly, or as near as a given rank allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank.adapters import adapters_of, holder, plan_of, wrapped_root
from lowrank.allocate.base import Allocation
from lowrank.choosing import read_weights
from lowrank.layers.adapter import Adapter
from lowrank.layers.gemm import down, up
from lowrank.linalg import closest_product
from lowrank.linalg.rows import pieces, shifted, spread
from lowrank.models.experts import stack_of
from lowrank.models.projections import Projection, Role
from lowrank.models.storage import weight_shape
from lowrank.plan import Plan
from lowrank.wrapping.checks import check_beside
from lowrank.wrapping.install import bare, device_beside
from lowrank.wrapping.rows import combined_rows

Term = tuple[Projection, Adapter, float]  # of the sum: the adapter of a projection, and its weight


class Squares(NamedTuple):
    """Squared Frobenius norms: of what an approximation leaves out, and of all."""

    left_out: float
    whole: float

    @property
    def relative(self) -> float:
        return sqrt(self.left_out / self.whole) if self.whole else 0.0


@torch.no_grad()
def combine_adapters(
    model: nn.Module,
    weights: Mapping[str, float] | Iterable[str],
    *,
    name: str,
    rank: int | None = None,
) -> nn.Module:
    """Puts an adapter ``name`` beside others whose update is the weighted sum of theirs; returns ``model``.

    The factors are concatenated, an anchored adapter with twice its rank, so that the sum is exact. Where
    that would be more than a projection's rank can be, or more than ``rank``, it is the closest update of
    that rank (Eckart and Young, 1936); the notes of the new plan say the relative error. The adapters that
    it was made of stay as they are. It waits until it is chosen.

    Args:
        weights: name → weight, as for `set_adapters`; names alone count with 1.
        name: of the new adapter.
        rank: the largest rank of any projection; by default as many as the sum needs.

    Raises:
        ValueError: the model is not wrapped, a name is unknown or taken, a weight or rank is out of range, or
            one of the adapters has magnitudes or trains modules in full, which cannot be added up.
    """
    root = wrapped_root(model)
    check_beside(model, name)
    names, factors = read_weights(root, weights)
    if not names:
        raise ValueError("expected the adapters to combine, got none")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"expected a rank of at least 1, got {rank!r}")
    plans = {each: plan_of(root, each) for each in names}
    for each, plan in plans.items():
        if plan.dora:
            raise ValueError(
                f"the adapter {each!r} has magnitudes (DoRA), which cannot be added up: "
                f"merge(model, {each!r}) makes it part of the base"
            )
        if plan.train:
            raise ValueError(
                f"the adapter {each!r} trains {', '.join(plan.train)} in full, and modules trained in full "
                "cannot be added up: combine adapters without them"
            )
    shares = {each: float(factors.get(each, 1.0)) for each in names}
    # What experts share stays shared where all of the terms are.
    apart = {(p.module, p.param) for plan in plans.values() for p in plan.adapted if p.shared == 1}
    by_weight: dict[tuple[str, str, int], list[Term]] = {}
    for each, share in shares.items():
        for p, adapter in adapters_of(root, each).items():
            stack = stack_of(holder(root, p), p.param)
            out = stack.out if stack else weight_shape(holder(root, p), p.param)[0]
            for own in p.apart(out) if (p.module, p.param) in apart else [p]:
                place = p.module, p.param, own.rows[0] // out
                by_weight.setdefault(place, []).append((own, adapter, share))
    dropouts = {plan.dropout for plan in plans.values()}
    rows, offsets = combined_rows(root, shares)
    with bare(root) as fittings:
        made, allocations, errors = {}, {}, {}
        for terms in by_weight.values():
            for group in _overlapping(terms):
                p = _together(root, [term[0] for term in group])
                A, B, errors[p] = _sum(p, group, rank)
                allocations[p] = Allocation(len(A), 1.0)
                adapter = Adapter.from_state({"A": A, "B": B}, 1.0, rows=p.rows)
                made[p] = adapter.to(device_beside(root, p))
        plan = Plan(
            allocations,
            dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
            notes=_notes(shares, errors),
            rows=rows,
        )
        fittings.install(name, plan, made, offsets)
    return model


def _overlapping(terms: Sequence[Term]) -> list[list[Term]]:
    """The terms of one weight, in groups whose rows overlap."""
    groups: list[tuple[set[int], list[Term]]] = []
    for term in sorted(terms, key=lambda each: each[0].rows):
        rows = {row for piece in pieces(term[0].rows) for row in range(*piece)}
        held = [term]
        for group in [group for group in groups if group[0] & rows]:
            groups.remove(group)
            rows, held = rows | group[0], group[1] + held
        groups.append((rows, held))
    # A block that covers some interleaved rows would cover other groups' rows too.
    mixed = any(len({p.rows for p, *_ in held}) > 1 for _, held in groups)
    if mixed and any(len(term[0].rows) > 2 for term in terms):
        return [list(terms)]
    return [held for _, held in groups]


def _together(root: nn.Module, projections: Sequence[Projection]) -> Projection:
    """One projection over the rows of all: the same one, where they are the same rows."""
    first = projections[0]
    if len({p.rows for p in projections}) == 1:
        return first
    start, stop = min(p.rows[0] for p in projections), max(p.rows[1] for p in projections)
    whole = (start, stop) == (0, weight_shape(root.get_submodule(first.module), first.param)[0])
    block = "" if whole else f"{start}:{stop}"
    return replace(first, rows=(start, stop), role=Role.OTHER, out_features=stop - start, block=block)


def _sum(p: Projection, terms: Sequence[Term], rank: int | None) -> tuple[Tensor, Tensor, Squares]:
    """A, B of the sum of ``terms`` on the rows of ``p``, and how much of it they leave out."""
    kept = terms[0][1].A.dtype
    downs, ups = [], []
    for q, adapter, share in terms:
        block = adapter.block
        A0, B0 = (None if each is None else each.double() for each in (block.A0, block.B0))
        downs.append(down(block.A.double(), A0, torch.float64).cpu())
        right = up(block.B.double(), B0, torch.float64).cpu()
        right = share * block.scaling * right
        if q.rows != p.rows:
            right = spread(right.mT, shifted(q.rows, -p.rows[0]), p.out_features).mT
        ups.append(right)
    A, B = torch.cat(downs), torch.cat(ups, 1)
    whole = float((B.T @ B * (A @ A.T)).sum())
    most = min(p.shape) if rank is None else min(rank, *p.shape)
    left_out = 0.0
    if len(A) > most:
        B, A, values = closest_product(B, A, most)
        left_out = float(values[most:].square().sum())
    return A.to(kept).contiguous(), B.to(kept).contiguous(), Squares(left_out, whole)


def _notes(shares: Mapping[str, float], errors: Mapping[Projection, Squares]) -> list[str]:
    """Where the adapter comes from, and how far it is from the sum, where it is not the sum."""
    parts = ", ".join(f"{name}: {share:.4g}" for name, share in shares.items())
    notes = [f"combined from {{{parts}}}"]
    worst = max(errors, key=lambda p: errors[p].relative)
    if errors[worst].relative > 1e-7:
        total = Squares(sum(e.left_out for e in errors.values()), sum(e.whole for e in errors.values()))
        notes.append(
            f"relative error of ΔW {total.relative:.2e} in all, at most {errors[worst].relative:.2e} "
            f"({worst.name})"
        )
    return notes
