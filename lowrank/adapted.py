"""A model with adapters in it: putting them in, finding them, switching them off, taking them out.

It decides nothing: which adapters, of what rank and how started, is said by `wrap` or read from a file.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowrank.exchange import Exchange
from lowrank.layers.adapter import Adapter
from lowrank.layers.linear import LoRALinear, master_dtype, multiplies, seen_by_compiler
from lowrank.layers.trained import TrainedModule
from lowrank.layers.weight import AdaptedWeight, WeightAdapters, adapt_weights, release_weights
from lowrank.plan import Plan
from lowrank.pretrained import attach, detach, forget_quantization
from lowrank.projections import (
    Projection,
    as_rows,
    is_linear,
    quantized,
    read_by_weight,
    stored_transposed,
)


@dataclass(frozen=True)
class Adaptation:
    """What was done to a model, kept on it as ``_lowrank``: enough to undo it and to save it."""

    plan: Plan
    required_grad: frozenset[str]  # parameters that required grad before, by their names then


# -- putting adapters in --------------------------------------------------------------------------------


def check_unwrapped(model: nn.Module) -> None:
    """Raises ValueError where ``model`` cannot be wrapped at all, or is wrapped already."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, not {type(model).__name__}")
    if "_orig_mod" in model._modules:
        raise ValueError("the model is compiled: wrap it first, then call torch.compile")
    _check_not_parallel(model)
    if any(isinstance(m, (LoRALinear, AdaptedWeight, TrainedModule)) for m in model.modules()):
        raise ValueError("the model is wrapped already: unwrap(model) or merge(model) first")
    if is_linear(model):
        raise ValueError(
            "the model is itself one projection, which cannot be replaced in place: wrap its parent"
        )


PARALLEL = frozenset(
    "DistributedDataParallel DataParallel FullyShardedDataParallel FSDPModule ReplicateModule "
    "DeepSpeedEngine".split()
)


def _check_not_parallel(model: nn.Module) -> None:
    """Raises ValueError where a parallel wrapper would not know of adapters that are put in beneath it."""
    for path, module in model.named_modules():
        wrappers = [kind.__name__ for kind in type(module).__mro__ if kind.__name__ in PARALLEL]
        if wrappers:
            raise ValueError(
                f"{path or 'the model'} is wrapped in {wrappers[0]}, which would not synchronize adapters "
                "between processes: adapt the model first, then make it parallel"
            )
    for name, parameter in model.named_parameters():
        if any(kind.__name__ == "DTensor" for kind in type(parameter).__mro__):
            raise ValueError(f"{name} is sharded (a DTensor): adapt the model first, then shard it")


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
            problems.append(
                f"{p.name}: rows {p.rows} of width {p.in_features} in a weight of shape {(rows, columns)}"
            )
    return problems


def weight_shape(module: nn.Module, param: str) -> tuple[int, int]:
    """``(rows, in)`` of a weight as `as_rows` would give it, also where it is stored packed."""
    if param == "weight" and isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    tensor = getattr(module, param)
    if param == "weight" and stored_transposed(module):
        return tensor.shape[1], tensor.shape[0]
    return tensor.numel() // tensor.shape[-1], tensor.shape[-1]


def on_weight(model: nn.Module, p: Projection) -> bool:
    """Is ``p`` adapted on the weight itself, because nothing calls a layer that holds it?"""
    return p.param != "weight" or read_by_weight(model, p.module)


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
                base, [adapter], in_features=columns, out_features=rows, dropout=plan.dropout
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
    _warn_at_first_backward(model)
    attach(model)


def _exchange(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces modules wherever ``model`` holds them, so that a shared one stays shared."""
    exchange = Exchange(replacements)
    for parent in list(model.modules()):
        if parent not in replacements:  # one that is taken out keeps what it holds of itself
            exchange.inside(vars(parent))


# -- finding and switching them -------------------------------------------------------------------------


def wrapped_root(model: nn.Module) -> nn.Module:
    """The module that was adapted: ``model``, or the one inside it (a compiled or parallel wrapper).

    Raises ValueError where there is none, or more than one: parts that were wrapped apart.
    """
    found = [path for path, module in model.named_modules() if "_lowrank" in module.__dict__]
    if not found:
        raise ValueError("the model is not wrapped: call wrap_model(model, policy) first")
    if len(found) > 1:
        raise ValueError(f"these parts were wrapped apart, so name one of them: {', '.join(found)}")
    return model.get_submodule(found[0])


def plan_of(model: nn.Module) -> Plan:
    """The plan that a wrapped model was built by, with the energy of each start where it is known."""
    return wrapped_root(model).__dict__["_lowrank"].plan


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted modules by path: `LoRALinear`s, and modules adapted on the weight."""
    kinds: Any = (LoRALinear, AdaptedWeight)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What the adapters train, also while it is frozen; modules trained in full are not among it."""
    for module in model.modules():
        if isinstance(module, Adapter):
            yield from module.trained()


def added_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter that wrapping put beside the base's, frozen or not."""
    for module in model.modules():
        if isinstance(module, (Adapter, TrainedModule)):
            yield from (module.copy if isinstance(module, TrainedModule) else module).parameters()


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by its path there, a shared one at each of its places.

    ``model`` may be wrapped. An adapted layer or a module trained in full is listed as it hangs in ``model``,
    and below it what its base holds.
    """
    found: dict[str, nn.Module] = {"": model}

    def walk(module: nn.Module, prefix: str) -> None:
        inner = module.base if isinstance(module, (LoRALinear, TrainedModule)) else module
        for name, child in inner._modules.items():
            if child is not None and not isinstance(child, WeightAdapters):
                found[f"{prefix}{name}"] = child
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    return found


def adapters_of(model: nn.Module) -> dict[Projection, Adapter]:
    """Projection → its adapter, in the plan's order, of the wrapped ``model``."""
    root = wrapped_root(model)
    found = {}
    for p in plan_of(root).adapted:
        module = root.get_submodule(p.module)
        held = module.lora.of(p.param) if isinstance(module, AdaptedWeight) else module.adapters
        (found[p],) = [adapter for adapter in cast("list[Adapter]", held) if adapter.rows == p.rows]
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


# -- noticing those that do nothing ----------------------------------------------------------------------


def unused_layers(model: nn.Module) -> list[str]:
    """Paths of the adapted layers that no forward has used so far, neither called nor read by their weight.

    None where nothing is known: no adapted layer was used yet, or compiled code ran, which keeps no record.
    """
    layers = _replaced_layers(model)
    if seen_by_compiler() or not any(layer.used for layer in layers.values()):
        return []
    return [path for path, layer in layers.items() if not layer.used]


def _replaced_layers(model: nn.Module) -> dict[str, LoRALinear]:
    layers = adapted_layers(wrapped_root(model))
    return {path: layer for path, layer in layers.items() if isinstance(layer, LoRALinear)}


def describe_unused(paths: Sequence[str]) -> str:
    """What a warning says of adapted layers that nothing has used."""
    shown = ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
    return (
        f"{len(paths)} adapted layers were not used by any forward so far: {shown}. Their adapters have no "
        "effect and do not train. If no later batch uses them, leave them out with exclude=: the model may "
        "hold the original layer in a place that cannot be replaced, or read its weight in a packed form"
    )


def _warn_at_first_backward(model: nn.Module) -> None:
    """Adapters that the first backward does not reach are named in a warning; afterwards no hook is left."""
    handles: list[RemovableHandle] = []
    root = weakref.ref(model)

    def check() -> None:
        wrapped = root()
        if wrapped is None or "_lowrank" not in wrapped.__dict__:
            return
        idle = [
            path
            for path, layer in _replaced_layers(wrapped).items()
            if not layer.used and all(p.grad is None for p in layer.adapters.parameters())
        ]
        if idle:
            warnings.warn(describe_unused(idle), stacklevel=2)

    def first(parameter: Tensor) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()
        if seen_by_compiler():  # only the gradients tell then, when all are there
            torch.autograd.Variable._execution_engine.queue_callback(check)
        else:
            check()

    for parameter in adapter_parameters(model):
        handles.append(parameter.register_post_accumulate_grad_hook(first))


# -- taking them out ------------------------------------------------------------------------------------


def unwrap(model: nn.Module) -> nn.Module:
    """Takes the adapters out again: the original modules are back, with their original bits.

    What was trained is dropped: `save_adapter` keeps it, `merge` keeps it in the weights.
    """
    root = wrapped_root(model)
    _remove(root, lambda module: module.base)
    return model


def merge(model: nn.Module, *, dequantize: bool = False) -> nn.Module:
    """Adds ΔW to the weights, in fp32 and rounded once, and takes the adapters out.

    Modules trained in full hand their weights to the original modules.

    Args:
        dequantize: a quantized weight, which cannot take ΔW without being quantized again, is replaced by
            W + ΔW in floating point; its layer then needs the memory of an unquantized one.

    Raises:
        ValueError: a weight is tied to another module's, is quantized, or is not all that its layer
            computes with, an adapter holds NaN or Inf, or a layer was passed by when its module ran, so that
            its adapter has had no effect; nothing was changed.
    """
    root = wrapped_root(model)
    adapters = adapters_of(root)
    _check_mergeable(root, list(adapters), dequantize)
    _check_effects(root, adapters)
    usual = _usual_dtype(root)
    by_weight: dict[tuple[str, str], dict[Projection, Adapter]] = {}
    for p, adapter in adapters.items():
        by_weight.setdefault((p.module, p.param), {})[p] = adapter
    unpacked = [_merge_weight(root, held, usual) for held in by_weight.values()]
    _remove(root, _with_trained_weights)
    if any(unpacked):
        forget_quantization(root)
    return model


@torch.no_grad()
def _merge_weight(root: nn.Module, held: Mapping[Projection, Adapter], usual: torch.dtype) -> bool:
    """Adds all adapters of one weight to it, one weight at a time in fp32; says whether it was quantized."""
    first = next(iter(held))
    stored = _stored(root, first)
    dtype, unpacked = stored.dtype, quantized(stored)
    if unpacked:
        dtype = _floating_dtype(stored, usual)
        _unpack(root, first)
    weight = _stored(root, first)
    if weight.dim() == 3:  # of experts: rows are a view of it only where it lies in order
        weight.data = weight.data.contiguous()
    for p, adapter in held.items():
        part = as_rows(holder(root, p), p.param)[slice(*p.rows)]
        part.copy_(adapter.product().add_(part))
    if unpacked:
        weight.data = weight.data.to(dtype)
        _match_bias(holder(root, first), dtype)
    return unpacked


def _check_effects(root: nn.Module, adapters: Mapping[Projection, Adapter]) -> None:
    """Raises ValueError where merging would spoil a weight, or give effect to an adapter that has none."""
    layers = _replaced_layers(root)
    unused = set(unused_layers(root))
    # A module that used one of its layers has run. Containers do not run: of their children any may be next.
    ran = {path.rpartition(".")[0] for path in layers.keys() - unused}
    containers = (nn.ModuleList, nn.ModuleDict)
    for p, adapter in adapters.items():
        if not all(factor.isfinite().all() for factor in adapter.parameters()):
            raise ValueError(f"the adapter of {p.name} holds NaN or Inf, and merging would spoil the weight")
        parent = p.module.rpartition(".")[0]
        passed_by = p.module in unused and parent in ran
        if passed_by and not isinstance(root.get_submodule(parent), containers) and adapter.product().any():
            raise ValueError(
                f"{p.name} was not used when the model ran, so its adapter has had no effect, and merging it "
                "would change the output: if another kind of batch uses this layer, call the model on one "
                "first; else unwrap(model), and adapt without it (exclude=)"
            )


def _check_mergeable(root: nn.Module, projections: Iterable[Projection], dequantize: bool) -> None:
    holders: dict[int, set[nn.Module]] = {}
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(module)
    for p in projections:
        weight, base = _stored(root, p), holder(root, p)
        if len(holders[id(weight)]) > 1:
            raise ValueError(f"{p.name} is tied to another module's weight, which merging would change too")
        if weight.is_meta:
            raise ValueError(
                f"{p.name} is on the meta device: there is nothing yet that ΔW could be added to"
            )
        if quantized(weight) and not dequantize:
            stored = f"{type(weight).__name__} of {weight.dtype}"
            raise ValueError(
                f"{p.name} is stored as {stored}; adding ΔW would mean to quantize again: keep the adapter "
                "beside it, or merge(model, dequantize=True) to have these layers in floating point"
            )
        try:
            product = on_weight(root, p) or multiplies(base, as_rows(base, p.param))
        except ValueError as error:
            raise ValueError(f"{p.name}: {error}") from error
        if not product:
            raise ValueError(
                f"{p.name}: the forward of {type(base).__name__} is more than a product with its weight, so "
                "adding ΔW to that is not the same as adding it to the output: keep the adapter beside it"
            )


def _usual_dtype(root: nn.Module) -> torch.dtype:
    """The floating-point dtype of most of the base's numbers, those apart that are quantized."""
    added = {id(parameter) for parameter in added_parameters(root)}
    numbers: Counter[torch.dtype] = Counter()
    for parameter in root.parameters():
        if id(parameter) not in added and not quantized(parameter):
            numbers[parameter.dtype] += parameter.numel()
    return numbers.most_common(1)[0][0] if numbers else torch.float32


def _floating_dtype(stored: Tensor, usual: torch.dtype) -> torch.dtype:
    """The dtype that ``stored`` has in floating point: its own, as torchao's tensors have, else ``usual``."""
    return stored.dtype if stored.is_floating_point() and stored.itemsize > 1 else usual


def _match_bias(layer: nn.Module, dtype: torch.dtype) -> None:
    """Gives ``layer`` a bias of its weight's dtype, which a plain layer needs, a quantized one not always."""
    bias = layer._parameters.get("bias")
    if bias is not None and bias.dtype != dtype:
        layer.register_parameter("bias", nn.Parameter(bias.detach().to(dtype), requires_grad=False))


def _unpack(root: nn.Module, p: Projection) -> None:
    """Puts the dequantized weight, in fp32, in the place of the packed one, in a plain layer."""
    layer = root.get_submodule(p.module)
    assert isinstance(layer, LoRALinear)
    weight = nn.Parameter(as_rows(layer.base, p.param).to(torch.float32, copy=True), requires_grad=False)
    if type(layer.base) is not nn.Linear:
        plain = nn.Linear(layer.in_features, layer.out_features, device="meta").train(layer.training)
        plain.register_parameter("bias", cast("nn.Parameter | None", layer.base.bias))
        layer.base = plain
    layer.base.register_parameter(p.param, weight)


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
