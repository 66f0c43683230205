"""Magnitudes beside a model's weights: where their first values come from; see `layers.magnitude`."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lowrank.adapters import holder
from lowrank.layers.adapter import Adapter
from lowrank.layers.bases import multiplies
from lowrank.layers.magnitude import Magnitude, row_norms
from lowrank.linalg.rows import copy_
from lowrank.models.projections import Projection
from lowrank.models.storage import as_rows
from lowrank.wrapping.install import Fittings


def magnitude_of(
    model: nn.Module,
    p: Projection,
    adapter: Adapter,
    start: Tensor | None = None,
    offset: Tensor | None = None,
) -> Magnitude:
    """The magnitudes (out,) of ``p`` in the base ``model``, beside ``adapter``; by default those of its rows.

    Raises:
        ValueError: the weight cannot be read, or its layer computes more than a product with it.
    """
    module = model.get_submodule(p.module)
    norms = norms_of(model, p)
    if not multiplies(module, as_rows(module, p.param)):
        raise ValueError(
            f"the forward of {type(module).__name__} is more than a product with its weight, so dora=True "
            "has no meaning there: leave it out with exclude="
        )
    magnitude = Magnitude(norms.to(adapter.A), start)
    if offset is not None:
        with torch.no_grad():
            magnitude.offset.copy_(offset)
    return magnitude


@torch.no_grad()
def norms_of(model: nn.Module, p: Projection) -> Tensor:
    """The norm of each row of ``p``'s weight in the base, in fp32 or better."""
    weight = p.weight(model)
    if weight.is_meta:
        raise ValueError(
            "it is on the meta device, and dora=True needs the norms of its rows: load the base first"
        )
    norms = row_norms(weight)
    if not norms.isfinite().all():
        raise ValueError("its weight holds NaN or Inf, or its rows are too large for dora=True")
    return norms


@torch.no_grad()
def magnitudes_by_module(root: nn.Module, adapters: Mapping[Projection, Adapter]) -> dict[str, Tensor]:
    """The magnitudes (out,) of whole weights: of rows without an adapter they are the base's norms."""
    found: dict[str, Tensor] = {}
    for p, adapter in adapters.items():
        assert adapter.magnitude is not None
        if p.module not in found:
            weight = as_rows(holder(root, p), p.param)
            found[p.module] = weight.to(adapter.A.dtype).norm(dim=1)
        copy_(found[p.module], p.rows, adapter.magnitude.values())
    return found


def renew_norms(fittings: Fittings, changed: Collection[str]) -> None:
    """Tells the magnitudes that stay on the weights of the modules ``changed`` of what these are now."""
    state = fittings.state
    for name, plan in state.plans.items() if state is not None else ():
        if not plan.dora:
            continue
        for module in changed:
            layer = fittings.layers.get(fittings.root.get_submodule(module))
            if layer is None or name not in layer.adapters:
                continue
            for p in plan.adapted:
                if p.module == module:
                    for adapter in layer.part(name).held():
                        if adapter.rows == p.rows and adapter.magnitude is not None:
                            adapter.magnitude.follow(norms_of(fittings.root, p), start=False)
