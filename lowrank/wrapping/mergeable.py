"""What must hold before updates are added to weights. It changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from lowrank.adapters import holder
from lowrank.layers.adapter import Adapter
from lowrank.layers.bases import multiplies
from lowrank.layers.tree import hung_at, original
from lowrank.models.kinds import kind_of
from lowrank.models.projections import Projection, on_weight
from lowrank.models.storage import as_rows, quantized
from lowrank.wrapping.unused import replaced_layers, unused_layers


def check_effects(root: nn.Module, name: str, adapters: Mapping[Projection, Adapter]) -> None:
    """Raises ValueError where merging would spoil a weight, or give effect to an adapter that has none."""
    layers = replaced_layers(root, name)
    unused = set(unused_layers(root, name))
    # A module that used one of its layers has run. Containers do not run: of their children any may be next.
    ran = {path.rpartition(".")[0] for path in layers.keys() - unused}
    containers = (nn.ModuleList, nn.ModuleDict)
    for p, adapter in adapters.items():
        if not all(factor.isfinite().all() for factor in adapter.parameters()):
            raise ValueError(
                f"the adapter of {p.name} holds NaN or Inf, and merging would write them into the weight"
            )
        parent = p.module.rpartition(".")[0]
        passed_by = p.module in unused and parent in ran
        if passed_by and not isinstance(original(hung_at(root, parent)), containers) and adapter.moved():
            raise ValueError(
                f"{p.name} was not used when the model ran, so its adapter has had no effect, and merging it "
                "would change the output: if another kind of batch uses this layer, call the model on one "
                "first; else unwrap(model), and adapt without it (exclude=)"
            )


def holders(root: nn.Module) -> dict[int, set[nn.Module]]:
    """The modules that hold each parameter, by its id."""
    holders: dict[int, set[nn.Module]] = {}
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(module)
    return holders


def check_mergeable(
    root: nn.Module, projections: Iterable[Projection], dequantize: bool, untie: bool
) -> None:
    modules = holders(root)
    for p in projections:
        weight, base = stored_weight(root, p), holder(root, p)
        if len(modules[id(weight)]) > 1 and not untie:
            raise ValueError(
                f"{p.name} is tied to another module's weight, which merging would change too: "
                "merge(model, untie=True) gives it a weight of its own"
            )
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
            known = on_weight(root, p) or kind_of(base) is not None
            product = known or multiplies(base, as_rows(base, p.param))
        except ValueError as error:
            raise ValueError(f"{p.name}: {error}") from error
        if not product:
            raise ValueError(
                f"{p.name}: the forward of {type(base).__name__} is more than a product with its weight, so "
                "adding ΔW to that is not the same as adding it to the output: keep the adapter beside it"
            )


def stored_weight(root: nn.Module, p: Projection) -> nn.Parameter:
    return holder(root, p)._parameters[p.param]  # type: ignore[return-value]
