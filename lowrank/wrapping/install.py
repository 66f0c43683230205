"""Puts ready-made adapters into a model, and takes them out again. It decides nothing and checks nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters import Adaptation
from lowrank.layers.adapter import Adapter
from lowrank.layers.linear import LoRALinear, master_dtype
from lowrank.layers.trained import TrainedModule
from lowrank.layers.weight import AdaptedWeight, adapt_weights, release_weights
from lowrank.models.projections import Projection, on_weight
from lowrank.models.storage import stored_transposed, weight_shape
from lowrank.plan import Plan
from lowrank.wrapping.exchange import Exchange
from lowrank.wrapping.pretrained import attach, detach
from lowrank.wrapping.unused import warn_at_first_backward


def make_adapter(
    model: nn.Module, p: Projection, A: Tensor, B: Tensor, scaling: float, frozen: Iterable[str] = ()
) -> Adapter:
    """An adapter for ``p`` with the full factors A, B, beside its weight."""
    weight = model.get_submodule(p.module)._parameters[p.param]
    assert weight is not None
    adapter = Adapter(A, B, scaling, rows=p.rows, frozen=frozenset(frozen), dtype=master_dtype(weight.dtype))
    return adapter.to(device_beside(model, p))


def device_beside(model: nn.Module, p: Projection) -> torch.device:
    """Where an adapter of ``p`` belongs: where its weight is, or, from the meta device, where it will be."""
    module = model.get_submodule(p.module)
    weight = module._parameters[p.param]
    assert weight is not None
    if not weight.is_meta:
        return weight.device
    # accelerate brings an offloaded weight to this device for each call.
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if device is None else device)


def install(model: nn.Module, plan: Plan, adapters: Mapping[Projection, Adapter]) -> None:
    """Puts ready-made adapters into ``model``. Everything was checked: this only assigns."""
    layers: dict[str, LoRALinear] = {}
    on_weights: dict[str, dict[str, list[Adapter]]] = {}
    for p, adapter in adapters.items():
        if on_weight(model, p):
            on_weights.setdefault(p.module, {}).setdefault(p.param, []).append(adapter)
        elif p.module in layers:
            layers[p.module].adapters.append(adapter)
        else:
            base = model.get_submodule(p.module)
            rows, columns = weight_shape(base, p.param)
            layers[p.module] = LoRALinear(
                base,
                [adapter],
                in_features=columns,
                out_features=rows,
                dropout=plan.dropout,
                transposed=stored_transposed(base),
            )
    trained = {path: TrainedModule(model.get_submodule(path)) for path in plan.train}

    required_grad = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    learning = [*adapters.values(), *(module.copy for module in trained.values())]
    own = {id(parameter) for module in learning for parameter in module.parameters()}
    new: dict[str, nn.Module] = {**layers, **trained}
    _exchange(model, {model.get_submodule(path): module for path, module in new.items()})
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    for path, held in on_weights.items():
        adapt_weights(model.get_submodule(path), held)
    model.__dict__["_lowrank"] = Adaptation(plan, required_grad)
    warn_at_first_backward(model)
    attach(model)


def remove(root: nn.Module, original: Callable[[Any], nn.Module]) -> None:
    detach(root)
    required_grad = root.__dict__["_lowrank"].required_grad
    modules: list[Any] = list(root.modules())
    for module in modules:
        if isinstance(module, AdaptedWeight):
            release_weights(module)
    replaced = [m for m in modules if isinstance(m, (LoRALinear, TrainedModule))]
    _exchange(root, {m: original(m) for m in replaced})
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in required_grad)
    del root.__dict__["_lowrank"]


def _exchange(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces modules wherever ``model`` holds them, so that a shared one stays shared."""
    exchange = Exchange(replacements)
    for parent in list(model.modules()):
        if parent not in replacements:  # one that is taken out keeps what it holds of itself
            exchange.inside(vars(parent))
