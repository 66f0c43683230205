"""Plans and applies: from a policy to a plan, from a plan to adapters in the model.

All or nothing: whatever can go wrong goes wrong before the model is touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.batches import Loss, Mask
from lowrank.calibration.source import Source
from lowrank.calibration.statistics import ProjectionStatistics, Statistics
from lowrank.init import Factors, Initializer, Kaiming
from lowrank.init.base import frozen_factors, needs_of
from lowrank.layers.adapter import Adapter
from lowrank.models.projections import Projection
from lowrank.models.targets import select
from lowrank.models.tokens import check_rows
from lowrank.plan import Plan
from lowrank.policy import Policy
from lowrank.progress import bar
from lowrank.wrapping.agreement import agreed
from lowrank.wrapping.checks import check_beside, check_layers, check_unwrapped
from lowrank.wrapping.install import bare, device_beside, make_adapter
from lowrank.wrapping.magnitudes import magnitude_of
from lowrank.wrapping.new_heads import warn_of_new_heads
from lowrank.wrapping.overrides import in_layers
from lowrank.wrapping.planning import fitted_plan, make_plan, named_errors
from lowrank.wrapping.sharing import shared_experts

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
    return make_plan(model, policy, source, start=False)[0]


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
    projections = select(
        model, policy.target, policy.exclude, policy.train, policy.fused, policy.roles
    ).projections
    projections, _ = in_layers(projections, policy)
    projections, _ = shared_experts(model, projections, policy)
    needs = {p: policy.allocate.needs | needs_of(policy.init, p.role) for p in projections}
    return Source(batches, loss, mask, progress=progress).measure(model, needs)


# -- wrapping -----------------------------------------------------------------------------------------


def wrap_model(
    model: nn.Module,
    policy: Policy | Plan,
    *,
    name: str = "default",
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

    Under `torch.distributed` every process must call this, with its own copy of the same base, before it is
    made parallel. All get the same plan and the same factors, from the calibration batches of all.

    Args:
        policy: what to do, or a `Plan` that says it projection by projection.
        name: of the adapter. Others can be put beside it: see `add_adapter`.
        batches, loss, mask, statistics, progress: as for `plan_model`.
        memory: bytes that the initializer's matrices (covariances, gradients) may take at once. Where they
            would take more, the batches are gone over several times, some projections at a time; without
            a limit they are read once, also where allocator and initializer both measure something.

    Raises:
        ValueError: see `plan_model`; also a model that is wrapped already.
    """
    check_unwrapped(model)
    return _adapt(model, policy, name, Source(batches, loss, mask, statistics, memory, progress))


def add_adapter(
    model: nn.Module,
    policy: Policy | Plan,
    *,
    name: str,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    mask: Mask | None = None,
    statistics: Statistics | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """Puts an adapter ``name`` beside those that ``model`` has, and returns the model.

    It has its own targets, ranks, dropout, start and modules trained in full. It is calibrated and
    initialized on the base, as if it were alone, and is the same adapter as alone. It trains at once, and
    waits to act until `set_adapters` names it; the first adapter of a model acts at once. The others and
    their ``requires_grad`` stay as they are.

    Args:
        policy, batches, loss, mask, statistics, memory, progress: as for `wrap_model`.
        name: a new one, without dots.

    Raises:
        ValueError: see `wrap_model`; also a name that is taken.
    """
    return _adapt(model, policy, name, Source(batches, loss, mask, statistics, memory, progress))


def _adapt(model: nn.Module, policy: Policy | Plan, name: str, source: Source) -> nn.Module:
    root = check_beside(model, name)
    if torch.is_inference_mode_enabled():
        raise ValueError("parameters made under torch.inference_mode() cannot be trained: wrap outside of it")
    with bare(root) as fittings:
        plan, adapters = agreed(root, lambda: _made(root, policy, source))
        warn_of_new_heads(root, plan)
        fittings.install(name, plan, adapters)
    return model


def _made(root: nn.Module, policy: Policy | Plan, source: Source) -> tuple[Plan, dict[Projection, Adapter]]:
    """The plan for the base ``root``, and all its adapters."""
    if isinstance(policy, Plan):
        plan, init = fitted_plan(root, policy), policy.init or Kaiming()
        check_layers(root, plan.adapted, plan.train, plan.dropout, dora=plan.dora)
        check_rows(plan.rows, plan.adapted, plan.train)
    else:
        plan, source.statistics = make_plan(root, policy, source, start=True)
        init = policy.init
    return plan, _adapters(root, plan, init, source)


def _adapters(root: nn.Module, plan: Plan, init: Initializer, source: Source) -> dict[Projection, Adapter]:
    """All adapters of ``plan``, as ``init`` starts them; the plan notes the energies of the starts."""
    adapters: dict[Projection, Adapter] = {}
    shown = bar(None, "initializing", total=len(plan.adapted), shown=source.shows, delay=2, leave=False)
    with shown:
        needs = {p: needs_of(init, p.role) for p in plan.adapted}
        for part, measured in source.parts(root, needs):
            for p in part:
                shown.set_postfix_str(p.name, refresh=False)
                adapters[p], energy = _start(root, p, plan, init, measured.get(p))
                shown.update()
                if energy is not None:
                    plan.energies[p] = energy
    return {p: adapters[p] for p in plan.adapted}


def _start(
    model: nn.Module, p: Projection, plan: Plan, init: Initializer, measured: ProjectionStatistics | None
) -> tuple[Adapter, float | None]:
    """The adapter of one projection as ``init`` starts it, and the energy of the start where it is known."""
    rank, scaling = plan[p].rank, plan[p].scaling
    generator = torch.Generator().manual_seed(_seed(plan.seed, p))
    with named_errors(p.name):
        weight, unreadable = _shown(model, p)
        try:
            with torch.no_grad():
                factors = init(weight, rank, scaling, role=p.role, statistics=measured, generator=generator)
            _check_factors(p, factors, rank, frozen_factors(init, p.role))
            adapter = make_adapter(model, p, factors.A, factors.B, scaling, factors.frozen)
            if plan.dora:
                adapter.magnitude = magnitude_of(model, p, adapter)
            return adapter, factors.energy
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
    nothing = torch.full((), torch.nan, device=device_beside(model, p)).expand(p.shape)
    try:
        weight = p.weight(model)
    except ValueError as error:
        return nothing, str(error)
    return (nothing, "it is on the meta device: load the base first") if weight.is_meta else (weight, "")


def _check_factors(p: Projection, factors: Factors, rank: int, declared: frozenset[str]) -> None:
    wanted = (rank, p.in_features), (p.out_features, rank)
    if (tuple(factors.A.shape), tuple(factors.B.shape)) != wanted:
        raise ValueError(
            f"the initializer: expected factors {wanted}, got A {tuple(factors.A.shape)} "
            f"and B {tuple(factors.B.shape)}"
        )
    if factors.frozen != declared:
        raise ValueError(
            f"the initializer freezes {sorted(factors.frozen)}, but its frozen(role) says {sorted(declared)}"
        )


def _seed(seed: int, p: Projection) -> int:
    """Each projection draws for itself, whatever else is adapted and in which order."""
    digest = hashlib.sha256(f"{seed}:{p.module}:{p.param}:{p.rows}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
