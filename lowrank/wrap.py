"""Plans and applies: from a policy to a plan, from a plan to adapters in the model.

All or nothing: whatever can go wrong goes wrong before the model is touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.adapted import (
    check_unwrapped,
    install,
    make_adapter,
    on_weight,
    projection_problems,
    weight_shape,
)
from lowrank.allocate.budget import Costs, check_affordable, limits, reference_rank, uniform_cost, unspent
from lowrank.batches import Loss, Mask
from lowrank.init import Factors, Initializer, Kaiming
from lowrank.init.base import frozen_factors, largest_rank, needs_of
from lowrank.layers.adapter import Adapter
from lowrank.measure import MATRICES, Source
from lowrank.plan import Allocation, Plan
from lowrank.policy import Policy
from lowrank.projections import Projection, is_linear, packed
from lowrank.statistics import ProjectionStatistics, Statistics
from lowrank.targets import select, trained_modules

# -- planning -----------------------------------------------------------------------------------------


def plan_model(
    model: nn.Module,
    policy: Policy,
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    mask: Mask | None = None,
    statistics: Statistics | None = None,
    progress: bool = True,
) -> Plan:
    """The plan that ``policy`` makes for ``model``. Touches nothing.

    Args:
        batches: calibration batches; needed where the policy's allocator measures something.
        loss: ``loss(model, batch) -> scalar``; by default the ``.loss`` of the model's output.
        mask: ``mask(batch) -> (batch, tokens)`` bool; by default the batch's ``attention_mask``.
        statistics: what was measured before, by `measure`; only what it lacks is measured.
        progress: show a bar where calibration takes more than two seconds.

    Raises:
        ValueError: the policy does not fit the model, or statistics are needed and there are none.
    """
    source = Source(batches, loss, mask, statistics, progress=progress)
    return _plan(model, policy, source, start=False)[0]


def measure(
    model: nn.Module,
    policy: Policy,
    batches: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    mask: Mask | None = None,
    progress: bool = True,
) -> Statistics:
    """All that ``policy`` measures on ``model``, to be saved or given to several policies as ``statistics=``.

    Arguments and errors as for `plan_model`.
    """
    projections = select(model, policy.target, policy.exclude, policy.train, policy.fused).projections
    needs = {p: policy.allocate.needs | needs_of(policy.init, p.role) for p in projections}
    return Source(batches, loss, mask, progress=progress).measure(model, needs)


def _plan(model: nn.Module, policy: Policy, source: Source, *, start: bool) -> tuple[Plan, Statistics]:
    """The plan, and the statistics measured for it; with ``start`` the initializer's too, if they fit."""
    check_unwrapped(model)
    if not isinstance(policy, Policy):
        raise ValueError(f"expected a Policy, such as lowrank.presets.lora(), not {policy!r}")
    train = trained_modules(model, policy.train)
    projections, notes = select(model, policy.target, policy.exclude, policy.train, policy.fused)
    check_layers(model, projections, train, policy.dropout)
    cost = _costs(policy.init, projections)
    rank, budget = _resolved(model, policy, cost)
    allocate = partial(_allocate, policy, rank, budget, cost)
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
        *limits(projections, cost, rank, policy.init),
        *unspent(allocations, cost, budget, policy.allocate),
    ]
    spent = sum(allocation.rank * cost[p] for p, allocation in allocations.items())
    plan = Plan(
        allocations,
        costs=cost,
        budget=budget if spent <= budget else None,
        init=policy.init,
        dropout=policy.dropout,
        train=train,
        seed=policy.seed,
        notes=notes,
        reference_rank=rank,
    )
    return plan, statistics


def _costs(init: Initializer, projections: Sequence[Projection]) -> Costs:
    """Trainable parameters of one rank of each projection, and the largest rank that ``init`` can make."""
    cost, largest = {}, {}
    for p in projections:
        with _named(p.name):
            frozen = frozen_factors(init, p.role)
            cost[p] = (0 if "A" in frozen else p.in_features) + (0 if "B" in frozen else p.out_features)
            largest[p] = largest_rank(init, p.shape, p.role)
    return Costs(cost, largest)


def _resolved(model: nn.Module, policy: Policy, cost: Costs) -> tuple[int, int]:
    """The reference rank and the budget in trainable parameters, once for whatever allocator.

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
    statistics: Mapping[Projection, ProjectionStatistics] | None,
) -> dict[Projection, Allocation]:
    """What the policy's allocator gives each projection, cut to the largest rank that it can have."""
    projections = list(cost)
    alpha = policy.alpha if policy.scaling == "alpha/r" else policy.reference_scaling(rank) * rank
    with _named(repr(policy.allocate)):
        given = policy.allocate(
            projections, rank=rank, budget=budget, alpha=alpha, cost=cost, statistics=statistics
        )
        missing = [p.name for p in projections if p not in given]
        if missing:
            raise ValueError(
                f"it gives nothing for {missing[0]} ({len(missing)} in all); leave alone is rank 0"
            )
        allocations = {p: replace(given[p], rank=min(given[p].rank, cost.largest[p])) for p in projections}
        spent = sum(allocation.rank * cost[p] for p, allocation in allocations.items())
        if policy.budget is not None and spent > budget:
            raise ValueError(f"its ranks cost {spent:,} parameters, more than the budget of {budget:,}")
    return allocations


@contextmanager
def _named(name: str) -> Iterator[None]:
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


# -- wrapping -----------------------------------------------------------------------------------------


def wrap_model(
    model: nn.Module,
    policy: Policy | Plan,
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    mask: Mask | None = None,
    statistics: Statistics | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """Adapts ``model`` in place and returns it: its own weights frozen, the adapters trainable.

    The base's weights are not written. Before the first training step the output is the base's, bit for
    bit on the CPU. On an error the model is as it was.

    Args:
        policy: what to do, or a `Plan` that says it projection by projection.
        batches, loss, mask, statistics, progress: as for `plan_model`.
        memory: bytes that the initializer's matrices (covariances, gradients) may take at once. Where they
            would take more, the batches are gone over several times, some projections at a time; without
            a limit they are read once, also where allocator and initializer both measure something.

    Raises:
        ValueError: see `plan_model`; also a model that is wrapped already.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("parameters made under torch.inference_mode() cannot be trained: wrap outside of it")
    source = Source(batches, loss, mask, statistics, memory, progress)
    if isinstance(policy, Plan):
        plan, init = _fitted(model, policy), policy.init or Kaiming()
        check_layers(model, plan.adapted, plan.train, plan.dropout)
    else:
        plan, source.statistics = _plan(model, policy, source, start=True)
        init = policy.init
    adapters: dict[Projection, Adapter] = {}
    bar = tqdm(total=len(plan.adapted), desc="initializing", disable=not progress, delay=2, leave=False)
    with bar:
        needs = {p: needs_of(init, p.role) for p in plan.adapted}
        for part, measured in source.parts(model, needs):
            for p in part:
                bar.set_postfix_str(p.name, refresh=False)
                adapters[p], energy = _start(model, p, plan, init, measured.get(p))
                bar.update()
                if energy is not None:
                    plan.energies[p] = energy
    install(model, plan, {p: adapters[p] for p in plan.adapted})
    return model


def _fitted(model: nn.Module, plan: Plan) -> Plan:
    """A copy of ``plan``, once all its projections were found in ``model``."""
    check_unwrapped(model)
    problems = projection_problems(model, plan.adapted)
    if problems:
        raise ValueError("the plan was made for another model:\n  " + "\n  ".join(problems))
    init = plan.init or Kaiming()
    for p in plan.adapted:
        with _named(p.name):
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
        seed=plan.seed,
        notes=plan.notes,
        reference_rank=plan.reference_rank,
    )


def _start(
    model: nn.Module, p: Projection, plan: Plan, init: Initializer, measured: ProjectionStatistics | None
) -> tuple[Adapter, float | None]:
    """The adapter of one projection as ``init`` starts it, and the energy of the start where it is known."""
    rank, scaling = plan[p].rank, plan[p].scaling
    generator = torch.Generator().manual_seed(_seed(plan.seed, p))
    with _named(p.name):
        weight, unreadable = _shown(model, p)
        try:
            with torch.no_grad():
                factors = init(weight, rank, scaling, role=p.role, statistics=measured, generator=generator)
            _check_factors(p, factors, rank, frozen_factors(init, p.role))
            return make_adapter(model, p, factors.A, factors.B, scaling, factors.frozen), factors.energy
        except (ValueError, RuntimeError) as error:
            if not unreadable:
                raise
            raise ValueError(
                f"{init} starts from its values, but {unreadable}; Kaiming() needs none"
            ) from error


def _shown(model: nn.Module, p: Projection) -> tuple[Tensor, str]:
    """The weight that an initializer sees, and why it is not the real one, where it is not.

    It is all NaN then: a start that takes no more than the shape from it works, any other is noticed.
    """
    nothing = torch.full((), torch.nan).expand(p.shape)
    try:
        weight = p.weight(model)
    except ValueError as error:
        return nothing, str(error)
    return (nothing, "it is on the meta device: load the base first") if weight.is_meta else (weight, "")


def _check_factors(p: Projection, factors: Factors, rank: int, declared: frozenset[str]) -> None:
    wanted = (rank, p.in_features), (p.out_features, rank)
    if (tuple(factors.A.shape), tuple(factors.B.shape)) != wanted:
        raise ValueError(
            f"the initializer made A {tuple(factors.A.shape)} and B {tuple(factors.B.shape)}, not {wanted}"
        )
    if factors.frozen != declared:
        raise ValueError(
            f"the initializer freezes {sorted(factors.frozen)}, but its frozen(role) says {sorted(declared)}"
        )


def _seed(seed: int, p: Projection) -> int:
    """Each projection draws for itself, whatever else is adapted and in which order."""
    digest = hashlib.sha256(f"{seed}:{p.module}:{p.param}:{p.rows}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# -- checks that need a model ---------------------------------------------------------------------------


def check_layers(
    model: nn.Module, projections: Sequence[Projection], train: Sequence[str], dropout: float
) -> None:
    """Raises ValueError where these projections and modules cannot be adapted and trained like that."""
    replaced = {p.module for p in projections if not on_weight(model, p)}
    for p in projections:
        module = model.get_submodule(p.module)
        stored = module._parameters.get(p.param)
        if stored is None:
            raise ValueError(
                f"{p.name}: its weight is no parameter, but a buffer or made from others, as by weight_norm "
                "and parametrizations: remove these first, or leave it out with exclude="
            )
        if isinstance(stored, nn.parameter.UninitializedParameter):
            raise ValueError(f"{p.name} has no shape yet: call the model on a batch first")
        if p.module not in replaced and packed(stored):
            raise ValueError(
                f"{p.name} is read without a call, so ΔW would be added to the weight itself, but it is "
                f"stored as {type(stored).__name__} of {stored.dtype}: leave it out with exclude="
            )
        parts = p.module.split(".")
        if "_orig_mod" in parts:
            compiled = ".".join(parts[: parts.index("_orig_mod")])
            raise ValueError(f"{compiled} is compiled: wrap first, then call torch.compile")
        for above in (".".join(parts[:i]) for i in range(1, len(parts))):
            if above in replaced:
                raise ValueError(
                    f"{p.name} lies inside {above}, which would be adapted too: leave one of them out with "
                    "exclude=, or take out the other adapter that it belongs to"
                )
    if dropout:
        held = [p.name for p in projections if on_weight(model, p)]
        if held:
            raise ValueError(
                f"dropout={dropout} cannot act on {held[0]} ({len(held)} in all), which is adapted on the "
                "weight: use dropout=0, or leave these out with exclude="
            )
    for path in train:
        module = model.get_submodule(path)
        for name, stored in module.named_parameters():
            if not stored.is_floating_point():
                raise ValueError(
                    f"train={path!r}: expected floating-point weights, got {name} in {stored.dtype}: "
                    "keep this module from being quantized, or adapt it instead"
                )
        tied = _tied_outside(model, module)
        if tied:
            raise ValueError(
                f"train={path!r}: its weight is tied to {tied}, and a copy trained apart would break the tie"
            )


def _tied_outside(model: nn.Module, module: nn.Module) -> str | None:
    """The name of a module outside ``module`` that holds one of its parameters."""
    inside = set(module.modules())
    own = {id(p) for p in module.parameters()}
    for path, other in model.named_modules():
        if other not in inside and any(id(p) in own for p in other.parameters(recurse=False)):
            return path or type(other).__name__
    return None
