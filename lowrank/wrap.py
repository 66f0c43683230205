"""Plans and applies: from a policy to a plan, from a plan to layers in the model, and back out again.

All or nothing: whatever can go wrong goes wrong before the model is touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.batches import Loss, Mask
from lowrank.calibrate import calibrate
from lowrank.init import Factors, Initializer, Kaiming
from lowrank.init.base import frozen_factors
from lowrank.layers.adapter import Adapter
from lowrank.layers.linear import LoRALinear, master_dtype
from lowrank.layers.trained import TrainedModule
from lowrank.layers.weight import AdaptedWeight, WeightAdapters, adapt_weights, release_weights
from lowrank.plan import Plan
from lowrank.policy import Policy
from lowrank.projections import Projection, as_rows, is_linear, read_by_weight
from lowrank.statistics import ProjectionStatistics
from lowrank.targets import select, trained_modules

Statistics = Mapping[Projection, ProjectionStatistics]


@dataclass(frozen=True)
class Adaptation:
    """What was done to a model, kept on it as ``_lowrank``: enough to undo it and to save it."""

    plan: Plan
    required_grad: frozenset[str]  # parameters that required grad before, by their names then


# -- planning -----------------------------------------------------------------------------------------


def plan_model(
    model: nn.Module,
    policy: Policy,
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    mask: Mask | None = None,
    progress: bool = True,
) -> Plan:
    """The plan that ``policy`` makes for ``model``. Touches nothing.

    Args:
        batches: calibration batches; needed where the policy's allocator measures something.
        loss: ``loss(model, batch) -> scalar``; by default the ``.loss`` of the model's output.
        mask: ``mask(batch) -> (batch, tokens)`` bool; by default the batch's ``attention_mask``.
        progress: show a bar where calibration takes more than two seconds.

    Raises:
        ValueError: the policy does not fit the model, or statistics are needed and there are none.
    """
    return _plan(model, policy, policy.allocate.needs, batches, loss, mask, progress)[0]


def _plan(
    model: nn.Module,
    policy: Policy,
    needs: frozenset[str],
    batches: Iterable[Any] | None,
    loss: Loss | None,
    mask: Mask | None,
    progress: bool,
) -> tuple[Plan, Statistics | None]:
    check_unwrapped(model)
    if not isinstance(policy, Policy):
        raise ValueError(f"expected a Policy, such as lowrank.presets.lora(), not {policy!r}")
    train = trained_modules(model, policy.train)
    projections = select(model, policy.target, policy.exclude, policy.train, policy.fused)
    cost = {p: _cost(policy.init, p) for p in projections}
    budget = policy.budget
    if isinstance(budget, float):
        budget = int(budget * sum(parameter.numel() for parameter in model.parameters()))
    if budget is not None and budget < min(cost.values()):
        raise ValueError(
            f"a budget of {budget:,} parameters is too small for one rank anywhere: "
            f"the cheapest costs {min(cost.values()):,}"
        )
    _check_layers(model, projections, train, policy.dropout)
    allocate = partial(
        policy.allocate, projections, rank=policy.rank, budget=budget, alpha=policy.alpha, cost=cost
    )
    # What needs no calibration complains before one.
    allocations = None if policy.allocate.needs else allocate(statistics=None)
    statistics = _measure(model, projections, needs, batches, loss, mask, progress)
    if allocations is None:
        allocations = allocate(statistics=statistics)
    plan = Plan(
        {p: allocations[p] for p in projections},
        costs=cost,
        budget=budget,
        init=policy.init,
        dropout=policy.dropout,
        train=train,
        seed=policy.seed,
    )
    return plan, statistics


def _cost(init: Initializer, p: Projection) -> int:
    frozen = frozen_factors(init, p.role)
    return (0 if "A" in frozen else p.in_features) + (0 if "B" in frozen else p.out_features)


def _measure(
    model: nn.Module,
    projections: Sequence[Projection],
    needs: frozenset[str],
    batches: Iterable[Any] | None,
    loss: Loss | None,
    mask: Mask | None,
    progress: bool,
) -> Statistics | None:
    if not needs:
        return None
    if batches is None:
        raise ValueError(f"this policy measures {' and '.join(sorted(needs))}: pass calibration batches=")
    return calibrate(model, projections, needs, batches, loss=loss, mask=mask, progress=progress)


# -- wrapping -----------------------------------------------------------------------------------------


def wrap_model(
    model: nn.Module,
    policy: Policy | Plan,
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    mask: Mask | None = None,
    progress: bool = True,
) -> nn.Module:
    """Adapts ``model`` in place and returns it: its own weights frozen, the adapters trainable.

    The base's weights are not written. Before the first training step the output is the base's, bit for
    bit on the CPU. On an error the model is as it was.

    Args:
        policy: what to do, or a `Plan` that says it projection by projection.
        batches, loss, mask, progress: as for `plan_model`; the batches are read once, also where both
            allocator and initializer measure something.

    Raises:
        ValueError: see `plan_model`; also a model that is wrapped already.
    """
    if isinstance(policy, Plan):
        plan = _fitted(model, policy)
        init = plan.init or Kaiming()
        _check_layers(model, plan.adapted, plan.train, plan.dropout)
        statistics = _measure(model, plan.adapted, init.needs, batches, loss, mask, progress)
    else:
        plan, statistics = _plan(model, policy, policy.needs if isinstance(policy, Policy) else frozenset(), batches, loss, mask, progress)
        init = policy.init
    adapters, energies = _start(model, plan, init, statistics, progress)
    plan.energies = energies
    install(model, plan, adapters)
    return model


def _fitted(model: nn.Module, plan: Plan) -> Plan:
    """A copy of ``plan``, once all its projections were found in ``model``."""
    check_unwrapped(model)
    problems = projection_problems(model, plan.adapted)
    if problems:
        raise ValueError("the plan was made for another model:\n  " + "\n  ".join(problems))
    return Plan(
        plan,
        costs=plan.costs,
        budget=plan.budget,
        init=plan.init,
        dropout=plan.dropout,
        train=trained_modules(model, plan.train),
        seed=plan.seed,
    )


def projection_problems(model: nn.Module, projections: Iterable[Projection]) -> list[str]:
    """A line for each of ``projections`` that ``model`` does not have in that shape."""
    problems = []
    modules = dict(model.named_modules())
    for p in projections:
        module = modules.get(p.module)
        tensor = None if module is None else module._parameters.get(p.param)
        if module is None or tensor is None:
            problems.append(f"{p.name}: the model has no such weight")
            continue
        rows, columns = weight_shape(module, p.param)
        if columns != p.in_features or p.rows[1] > rows or p.rows[1] - p.rows[0] != p.out_features:
            problems.append(f"{p.name}: rows {p.rows} of width {p.in_features} in a weight of shape {(rows, columns)}")
    return problems


def weight_shape(module: nn.Module, param: str) -> tuple[int, int]:
    """``(rows, in)`` of a weight as `as_rows` would give it, also where it is stored packed."""
    if param == "weight" and isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    tensor = getattr(module, param)
    if getattr(module, "nf", None) == tensor.shape[-1]:
        return tensor.shape[1], tensor.shape[0]
    return tensor.numel() // tensor.shape[-1], tensor.shape[-1]


def _start(
    model: nn.Module, plan: Plan, init: Initializer, statistics: Statistics | None, progress: bool
) -> tuple[dict[Projection, Adapter], dict[Projection, float]]:
    """The adapters of a plan, as its initializer starts them."""
    adapters, energies = {}, {}
    bar = tqdm(plan.adapted, "initializing", disable=not progress, delay=2, leave=False)
    for p in bar:
        bar.set_postfix_str(p.name, refresh=False)
        rank, scaling = plan[p].rank, plan[p].scaling
        weight = p.weight(model)
        measured = None if statistics is None else statistics[p]
        generator = torch.Generator().manual_seed(_seed(plan.seed, p))
        with torch.no_grad():
            factors = init(weight, rank, scaling, role=p.role, statistics=measured, generator=generator)
        _check_factors(p, factors, rank, frozen_factors(init, p.role))
        adapters[p] = make_adapter(model, p, factors.A, factors.B, scaling, factors.frozen)
        if factors.energy is not None:
            energies[p] = factors.energy
    return adapters, energies


def make_adapter(
    model: nn.Module, p: Projection, A: Tensor, B: Tensor, scaling: float, frozen: Iterable[str] = ()
) -> Adapter:
    """An adapter for ``p`` with the full factors A, B, on the device of its weight."""
    weight = model.get_submodule(p.module)._parameters[p.param]
    assert weight is not None
    return Adapter(
        A, B, scaling, rows=p.rows, frozen=frozenset(frozen), dtype=master_dtype(weight.dtype)
    ).to(weight.device)


def _check_factors(p: Projection, factors: Factors, rank: int, declared: frozenset[str]) -> None:
    wanted = (rank, p.in_features), (p.out_features, rank)
    if (tuple(factors.A.shape), tuple(factors.B.shape)) != wanted:
        raise ValueError(
            f"{p.name}: the initializer made A {tuple(factors.A.shape)} and B {tuple(factors.B.shape)}, not {wanted}"
        )
    if factors.frozen != declared:
        raise ValueError(
            f"{p.name}: the initializer freezes {sorted(factors.frozen)} but its frozen(role) says {sorted(declared)}"
        )


def _seed(seed: int, p: Projection) -> int:
    """Each projection draws for itself, whatever else is adapted and in which order."""
    digest = hashlib.sha256(f"{seed}:{p.module}:{p.param}:{p.rows}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def install(model: nn.Module, plan: Plan, adapters: Mapping[Projection, Adapter]) -> None:
    """Puts ready-made adapters into ``model``. Everything was checked: this only assigns."""
    layers: dict[str, LoRALinear | TrainedModule] = {}
    on_weights: dict[str, dict[str, list[Adapter]]] = {}
    for p, adapter in adapters.items():
        if on_weight(model, p):
            on_weights.setdefault(p.module, {}).setdefault(p.param, []).append(adapter)
        elif p.module in layers:
            layers[p.module].adapters.append(adapter)  # type: ignore[operator, union-attr]
        else:
            base = model.get_submodule(p.module)
            rows, columns = weight_shape(base, p.param)
            layers[p.module] = LoRALinear(
                base, [adapter], in_features=columns, out_features=rows, dropout=plan.dropout
            )
    for path in plan.train:
        layers[path] = TrainedModule(model.get_submodule(path))

    required_grad = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    own = {id(p) for layer in layers.values() for name, p in layer.named_parameters() if not name.startswith("base.")}
    _exchange(model, {model.get_submodule(path): layer for path, layer in layers.items()})
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    for path, held in on_weights.items():
        adapt_weights(model.get_submodule(path), held)
    model.__dict__["_lowrank"] = Adaptation(plan, required_grad)


def on_weight(model: nn.Module, p: Projection) -> bool:
    """Is ``p`` adapted on the weight itself, because nothing calls a layer that holds it?"""
    return p.param != "weight" or read_by_weight(model, p.module)


def _exchange(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces modules wherever they hang, so that a shared one stays shared."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                parent._modules[name] = replacements[child]


# -- checks that need a model ---------------------------------------------------------------------------


def check_unwrapped(model: nn.Module) -> None:
    """Raises ValueError where ``model`` cannot be wrapped at all, or is wrapped already."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, not {type(model).__name__}")
    if any(isinstance(m, (LoRALinear, AdaptedWeight, TrainedModule)) for m in model.modules()):
        raise ValueError("the model is wrapped already: unwrap(model) or merge(model) first")
    if is_linear(model):
        raise ValueError("the model is itself one projection, which cannot be replaced in place: wrap its parent")


def _check_layers(
    model: nn.Module, projections: Sequence[Projection], train: Sequence[str], dropout: float
) -> None:
    if dropout:
        held = [p.name for p in projections if on_weight(model, p)]
        if held:
            raise ValueError(
                f"dropout={dropout} cannot act on {held[0]} ({len(held)} in all), which is adapted on the weight: "
                "use dropout=0, or leave these out with exclude="
            )
    for path in train:
        module = model.get_submodule(path)
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


# -- a wrapped model --------------------------------------------------------------------------------------


def wrapped_root(model: nn.Module) -> nn.Module:
    """The module that `wrap_model` was given: ``model``, or the one inside it (a compiled or parallel wrapper)."""
    for module in model.modules():
        if "_lowrank" in module.__dict__:
            return module
    raise ValueError("the model is not wrapped: call wrap_model(model, policy) first")


def plan_of(model: nn.Module) -> Plan:
    """The plan that a wrapped model was built by, with the energy of each start where it is known."""
    return wrapped_root(model).__dict__["_lowrank"].plan


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted modules by path: `LoRALinear`s, and modules adapted on the weight."""
    kinds = (LoRALinear, AdaptedWeight)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trainable parameters of the adapters; modules trained in full are not among them."""
    for module in model.modules():
        if isinstance(module, Adapter):
            yield from (p for p in module.parameters() if p.requires_grad)


def adapters_of(model: nn.Module) -> dict[Projection, Adapter]:
    """Projection → its adapter, in the plan's order, of the wrapped ``model``."""
    root = wrapped_root(model)
    found = {}
    for p in plan_of(root).adapted:
        module = root.get_submodule(p.module)
        held = module.lora.of(p.param) if isinstance(module, AdaptedWeight) else module.adapters
        (found[p],) = [adapter for adapter in held if adapter.rows == p.rows]  # type: ignore[union-attr]
    return found


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, ``model`` is exactly the base model, modules trained in full included."""
    root = wrapped_root(model)
    switches = [m for m in root.modules() if isinstance(m, (LoRALinear, WeightAdapters, TrainedModule))]
    before = [switch.enabled for switch in switches]
    for switch in switches:
        switch.enabled = False
    try:
        yield model
    finally:
        for switch, enabled in zip(switches, before, strict=True):
            switch.enabled = enabled


def unwrap(model: nn.Module) -> nn.Module:
    """Takes the adapters out again: the original modules are back, with their original bits.

    What was trained is dropped: `save_adapter` keeps it, `merge` keeps it in the weights.
    """
    root = wrapped_root(model)
    _remove(root, lambda module: module.base)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Adds ΔW to the weights, in fp32 and rounded once, and takes the adapters out.

    Modules trained in full hand their weights to the original modules.

    Raises:
        ValueError: a weight is tied to another module's, or is stored quantized; nothing was changed.
    """
    root = wrapped_root(model)
    adapters = adapters_of(root)
    holders: dict[int, set[nn.Module]] = {}
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(module)
    for p in adapters:
        weight = _stored(root, p)
        if len(holders[id(weight)]) > 1:
            raise ValueError(f"{p.name} is tied to another module's weight, which merging would change too")
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise ValueError(
                f"{p.name} is stored as {type(weight).__name__} of {weight.dtype}; adding ΔW would mean to quantize "
                "again: keep the adapter beside it, or merge into a base loaded in floating point"
            )
    with torch.no_grad():
        for p, adapter in adapters.items():
            part = as_rows(holder(root, p), p.param)[slice(*p.rows)]
            delta = adapter.product()
            part.copy_(part.to(delta.dtype) + delta)
    _remove(root, _with_trained_weights)
    return model


def holder(root: nn.Module, p: Projection) -> nn.Module:
    """The base's own module that holds ``p``'s weight, in a wrapped model."""
    module = root.get_submodule(p.module)
    return module.base if isinstance(module, LoRALinear) else module


def _stored(root: nn.Module, p: Projection) -> nn.Parameter:
    return holder(root, p)._parameters[p.param]  # type: ignore[return-value]


def _with_trained_weights(module: LoRALinear | TrainedModule) -> nn.Module:
    if isinstance(module, TrainedModule):
        module.base.load_state_dict(module.copy.state_dict())
    return module.base


def _remove(root: nn.Module, original: Callable[[Any], nn.Module]) -> None:
    required_grad = root.__dict__["_lowrank"].required_grad
    modules = list(root.modules())
    for module in modules:
        if isinstance(module, AdaptedWeight):
            release_weights(module)  # type: ignore[arg-type]
    replaced = [m for m in modules if isinstance(m, (LoRALinear, TrainedModule))]
    _exchange(root, {m: original(m) for m in replaced})
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in required_grad)
    del root.__dict__["_lowrank"]
