"""From a policy to a plan: what is targeted, what the budget pays for, and what an allocator makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod

import torch
from torch import nn

from lowrank.allocate.base import Allocation
from lowrank.allocate.budget import Costs, check_affordable, limits, reference_rank, uniform_cost, unspent
from lowrank.calibration.source import MATRICES, Source
from lowrank.calibration.statistics import ProjectionStatistics, Statistics
from lowrank.init import Initializer, Kaiming
from lowrank.init.base import frozen_factors, largest_rank, needs_of
from lowrank.models.projections import Projection
from lowrank.models.storage import is_linear, weight_shape
from lowrank.models.targets import select
from lowrank.models.tokens import check_rows, find_rows, row_problems
from lowrank.models.trained import trained_modules
from lowrank.plan import Plan
from lowrank.policy import Policy
from lowrank.wrapping.checks import check_layers, check_unwrapped, projection_problems
from lowrank.wrapping.overrides import divided, divisors, in_layers, matched, overridden
from lowrank.wrapping.sharing import shared_experts


def make_plan(model: nn.Module, policy: Policy, source: Source, *, start: bool) -> tuple[Plan, Statistics]:
    """The plan, and the statistics measured for it; with ``start`` the initializer's too, if they fit."""
    check_unwrapped(model)
    if not isinstance(policy, Policy):
        raise ValueError(f"expected a Policy, such as lowrank.presets.lora(), got {policy!r}")
    train, rows = trained_modules(model, policy.train), find_rows(model, policy.rows)
    projections, notes, left_out, meant = select(
        model, policy.target, policy.exclude, policy.train, policy.fused, policy.roles
    )
    projections, outside = in_layers(projections, policy)
    projections, shared = shared_experts(model, projections, policy)
    check_layers(model, projections, train, policy.dropout, dora=policy.dora)
    check_rows(rows, projections, train)
    cost = _costs(policy.init, projections)
    magnitudes = sum(p.out_features for p in projections) if policy.dora else 0
    rank, budget = _resolved(model, policy, cost, magnitudes)
    active = divisors(model, projections, policy)
    allocate = partial(_allocate, policy, rank, budget, cost, active)
    # What needs no calibration complains before one.
    allocations = None if policy.allocate.needs else allocate(statistics=None)
    needs = dict.fromkeys(projections, policy.allocate.needs)
    if start:
        both = {p: needs[p] | needs_of(policy.init, p.role) for p in projections}
        whole = source.fits(both)
        if not whole:
            source.check_rereadable(both)
        needs = {p: both[p] if whole else needs[p] | (both[p] - MATRICES) for p in projections}
    statistics = source.measure(model, needs)
    if allocations is None:
        allocations = allocate(statistics=statistics)
    notes = [
        *notes,
        *outside,
        *shared,
        *limits(projections, cost, rank, policy.init),
        *divided(active),
        *([] if policy.ranks or active else unspent(allocations, cost, budget, policy.allocate)),
    ]
    spent = sum(allocation.rank * cost[p] for p, allocation in allocations.items())
    plan = Plan(
        allocations,
        costs=cost,
        budget=budget + magnitudes if spent <= budget and not (policy.ranks or active) else None,
        init=policy.init,
        dropout=policy.dropout,
        train=train,
        seed=policy.seed,
        notes=notes,
        left_out=left_out,
        matches=matched(policy, meant, projections),
        reference_rank=rank,
        dora=policy.dora,
        rows=rows,
    )
    return plan, statistics


def _costs(init: Initializer, projections: Sequence[Projection]) -> Costs:
    """Trainable parameters of one rank of each projection, and the largest rank that ``init`` can make."""
    cost, largest = {}, {}
    for p in projections:
        with named_errors(p.name):
            frozen = frozen_factors(init, p.role)
            cost[p] = (0 if "A" in frozen else p.in_features) + (0 if "B" in frozen else p.out_features)
            largest[p] = largest_rank(init, p.shape, p.role)
    return Costs(cost, largest)


def _resolved(model: nn.Module, policy: Policy, cost: Costs, magnitudes: int) -> tuple[int, int]:
    """The reference rank and the budget of the factors in trainable parameters, once for whatever allocator.

    Magnitudes come first: a policy's budget pays for them too.

    Raises:
        ValueError: a rank that no projection can have, or a budget below one rank anywhere.
    """
    projections = list(cost)
    widest = max(projections, key=lambda p: cost.largest[p])
    most = cost.largest[widest]
    if not most:
        raise ValueError(f"{policy.init!r} can make no rank of {widest.name}, nor of any other target")
    if policy.budget is None:
        if policy.rank > most:
            raise ValueError(
                f"rank {policy.rank} is more than {policy.init!r} can make of any target: the largest is "
                f"{most}, of {widest.name} with shape {widest.shape}"
            )
        return policy.rank, uniform_cost(projections, cost, policy.rank)
    budget = policy.budget
    if isinstance(budget, float):
        budget = int(budget * _logical_size(model))
    if magnitudes and magnitudes >= budget:
        raise ValueError(
            f"a budget of {budget:,} parameters is too small for dora=True, whose magnitudes alone "
            f"take {magnitudes:,}"
        )
    budget -= magnitudes
    check_affordable(budget, [cost[p] for p in projections if cost.largest[p]])
    return reference_rank(projections, cost, budget), budget


def _logical_size(model: nn.Module) -> int:
    """The parameters of ``model``: shared ones once, a packed weight by the shape that it stands for."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in sizes:
                continue
            state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two numbers in a byte
            if name == "weight" and is_linear(module):
                rows, columns = weight_shape(module, name)
                sizes[id(parameter)] = rows * columns
            else:
                sizes[id(parameter)] = parameter.numel() if state is None else prod(state.shape)
    return sum(sizes.values())


def _allocate(
    policy: Policy,
    rank: int,
    budget: int,
    cost: Costs,
    active: Mapping[Projection, int],
    statistics: Mapping[Projection, ProjectionStatistics] | None,
) -> dict[Projection, Allocation]:
    """What the policy's allocator gives each projection, cut to the largest rank that it can have."""
    projections = list(cost)
    alpha = policy.alpha if policy.scaling == "alpha/r" else policy.reference_scaling(rank) * rank
    with named_errors(repr(policy.allocate)):
        given = policy.allocate(
            projections, rank=rank, budget=budget, alpha=alpha, cost=cost, statistics=statistics
        )
        missing = [p.name for p in projections if p not in given]
        if missing:
            raise ValueError(
                f"it gives nothing for {missing[0]} ({len(missing)} in all); rank 0 leaves a projection alone"
            )
        allocations = {p: replace(given[p], rank=min(given[p].rank, cost.largest[p])) for p in projections}
        spent = sum(allocation.rank * cost[p] for p, allocation in allocations.items())
        if policy.budget is not None and spent > budget:
            raise ValueError(f"its ranks cost {spent:,} parameters, more than the budget of {budget:,}")
    return overridden(allocations, policy, cost, rank, active)


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Errors within become ValueErrors that say ``name``, with the error as cause; lack of memory is kept."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        error.add_note(name)
        raise
    except Exception as error:
        plain = isinstance(error, ValueError | RuntimeError)
        said = str(error) if plain else f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: {said}") from error


def fitted_plan(model: nn.Module, plan: Plan) -> Plan:
    """A copy of ``plan``, once all its projections were found in ``model``."""
    check_unwrapped(model)
    problems = projection_problems(model, plan.adapted) + row_problems(model, plan.rows)
    if problems:
        raise ValueError("the plan was made for another model:\n  " + "\n  ".join(problems))
    init = plan.init or Kaiming()
    for p in plan.adapted:
        with named_errors(p.name):
            most = largest_rank(init, p.shape, p.role)
        if plan[p].rank > most:
            problems.append(f"{p.name} of shape {p.shape}: rank {plan[p].rank}, at most {most}")
    if problems:
        raise ValueError(f"the plan has ranks that {init!r} cannot make:\n  " + "\n  ".join(problems))
    return Plan(
        plan,
        costs=plan.costs,
        budget=plan.budget,
        init=plan.init,
        dropout=plan.dropout,
        train=trained_modules(model, plan.train),
        rows=plan.rows,
        seed=plan.seed,
        notes=plan.notes,
        left_out=plan.left_out,
        matches=plan.matches,
        reference_rank=plan.reference_rank,
        learning_rate=plan.learning_rate,
        dora=plan.dora,
    )
