"""What wrapping, loading and importing all check before a model is touched. It changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lowrank.adapters import adaptation, wrapped_root
from lowrank.layers.acting import Acting
from lowrank.layers.layer import AdaptedLayer
from lowrank.layers.trained import TrainedModule
from lowrank.layers.weight import AdaptedWeight, WeightAdapters
from lowrank.linalg.rows import height, lie_within
from lowrank.models.experts import stack_of
from lowrank.models.kinds import kind_of
from lowrank.models.projections import Projection, on_weight
from lowrank.models.storage import is_linear, packed, weight_shape
from lowrank.processes import in_parts
from lowrank.wrapping.resizing import layers_of_tokens, vocabulary_problem

PARALLEL = frozenset(
    "DistributedDataParallel DataParallel FullyShardedDataParallel FSDPModule ReplicateModule "
    "DeepSpeedEngine".split()
)


def check_unwrapped(model: nn.Module) -> None:
    """Raises ValueError where ``model`` cannot be wrapped at all, or is wrapped already."""
    check_adaptable(model)
    if any(isinstance(m, (AdaptedLayer, AdaptedWeight, TrainedModule)) for m in model.modules()):
        raise ValueError(
            "the model is wrapped already: unwrap(model) or merge(model) first, or put another adapter "
            "beside those that it has with add_adapter(model, policy, name=…)"
        )


def check_beside(model: nn.Module, name: str) -> nn.Module:
    """The module that an adapter ``name`` can be put into, beside others or as the first; else ValueError."""
    check_adaptable(model)
    check_name(name)
    if not any("_lowrank" in module.__dict__ for module in model.modules()):
        check_unwrapped(model)
        return model
    root = wrapped_root(model)
    if name in adaptation(root).plans:
        raise ValueError(
            f"the model has an adapter {name!r} already: choose another name=, or remove_adapter(model, "
            f"{name!r}) first"
        )
    return root


def check_name(name: Any) -> None:
    """Raises ValueError where ``name`` cannot be that of an adapter."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"expected the name of an adapter: a string without dots, got {name!r}")
    if hasattr(WeightAdapters(Acting()), name):
        raise ValueError(
            f"{name!r} is a name that PyTorch's modules use themselves: choose another for the adapter, such "
            f"as {name + '_1'!r}"
        )


def check_adaptable(model: nn.Module) -> None:
    """Raises ValueError where nothing can be put into ``model``: it is compiled, parallel, or no module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if "_orig_mod" in model._modules:
        raise ValueError("the model is compiled: wrap it first, then call torch.compile")
    _check_not_parallel(model)
    _check_not_of_peft(model)
    if is_linear(model):
        raise ValueError(
            "the model is itself one projection, which cannot be replaced in place: wrap its parent"
        )


def _check_not_of_peft(model: nn.Module) -> None:
    """Raises ValueError where ``model`` holds layers of PEFT's."""
    for path, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"{path or 'the model'} is PEFT's: take its adapters out first (unload(), or "
                "merge_and_unload()), or bring what PEFT saved to a fresh base, import_peft(base, folder)"
            )


def _check_not_parallel(model: nn.Module) -> None:
    """Raises ValueError where a parallel wrapper would not know of adapters that are put in beneath it."""
    for path, module in model.named_modules():
        wrappers = [kind.__name__ for kind in type(module).__mro__ if kind.__name__ in PARALLEL]
        if wrappers:
            raise ValueError(
                f"{path or 'the model'} is wrapped in {wrappers[0]}, which does not know of adapters that "
                "are added later: adapt the model first, then make it parallel"
            )
    for name, parameter in model.named_parameters():
        if any(kind.__name__ == "DTensor" for kind in type(parameter).__mro__):
            raise ValueError(
                f"{name} is sharded (a DTensor): adapt the model first, then shard it with fully_shard; "
                "adapters on a tensor-parallel base are not supported"
            )


def check_whole(model: nn.Module, what: str) -> None:
    """Raises ValueError where no process holds all of ``model``, which ``what`` needs."""
    if in_parts(model):
        raise ValueError(
            f"{what} needs the whole model, and this one is sharded: call save_adapter(model, path) in every "
            f"process, then load_adapter(base, path) and {what} in one process"
        )


def projection_problems(model: nn.Module, projections: Iterable[Projection]) -> list[str]:
    """A line for each of ``projections`` that ``model`` does not have in that shape."""
    problems, projections = [], list(projections)
    modules, tokens = dict(model.named_modules()), layers_of_tokens(model)
    shared = {(p.module, p.param) for p in projections if p.shared != 1}
    for p in projections:
        module = modules.get(p.module)
        tensor = None if module is None else module._parameters.get(p.param)
        if module is None or tensor is None:
            problems.append(f"{p.name}: the model has no such weight")
            continue
        rows, columns = weight_shape(module, p.param)
        stack = stack_of(module, p.param)
        if stack and p.rows[0] // stack.out != (p.rows[1] - 1) // stack.out:
            problems.append(f"{p.name}: rows {p.rows} of more than one expert, which have {stack.out} each")
            continue
        if p.shared != 1 and (stack is None or p.shared != stack.experts or p.rows[1] > stack.out):
            there = stack.experts if stack else "no"
            problems.append(f"{p.name}: shared by {p.shared} experts, and the weight has {there}")
            continue
        if p.shared == 1 and (p.module, p.param) in shared:
            problems.append(f"{p.name}: another adapter of this plan is shared by all experts of the weight")
            continue
        if problem := vocabulary_problem(module, p, (rows, columns), tokens):
            problems.append(problem)
            continue
        fit = lie_within(p.rows, rows) and height(p.rows) == p.out_features
        if columns != p.in_features or not fit:
            problems.append(
                f"{p.name}: rows {p.rows} of width {p.in_features} in a weight of shape {(rows, columns)}"
            )
    return problems


def check_layers(
    model: nn.Module,
    projections: Sequence[Projection],
    train: Sequence[str],
    dropout: float,
    *,
    dora: bool = False,
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
        kind = kind_of(module) if dora else None
        if kind is not None:
            raise ValueError(
                f"dora=True cannot act on {p.name}, of role {kind.role.value}, only on linear layers: use "
                "dora=False, or leave it out with exclude="
            )
    held = [p.name for p in projections if on_weight(model, p)]
    for used, said, off in (
        (bool(dropout), f"dropout={dropout}", "dropout=0"),
        (dora, "dora=True", "dora=False"),
    ):
        if used and held:
            raise ValueError(
                f"{said} cannot act on {held[0]} ({len(held)} in all), which is adapted on the "
                f"weight: use {off}, or leave these out with exclude="
            )
    holders = _holders(model) if train else {}
    for path in train:
        module = model.get_submodule(path)
        for name, stored in module.named_parameters():
            if not stored.is_floating_point():
                raise ValueError(
                    f"train={path!r}: expected floating-point weights, got {name} in {stored.dtype}: "
                    "keep this module from being quantized, or adapt it instead"
                )
        tied = _tied_outside(module, holders)
        if tied:
            raise ValueError(
                f"train={path!r}: its weight is tied to {tied}, and a copy trained apart would break the "
                f"tie: adapt it with target={path!r}, train some of its rows with rows=, or untie the two "
                "first (docs/targets.md)"
            )


def _holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """The modules that hold each parameter, by its id, in the model's order, each with its path."""
    held: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            held.setdefault(id(parameter), []).append((path, module))
    return held


def _tied_outside(module: nn.Module, holders: Mapping[int, Sequence[tuple[str, nn.Module]]]) -> str | None:
    """The name of a module outside ``module`` that holds one of its parameters."""
    inside = set(module.modules())
    beside = (each for p in module.parameters() for each in holders[id(p)])
    return next((path or type(other).__name__ for path, other in beside if other not in inside), None)
