"""The rows of embeddings that an adapter trains: in its folder, in a merged weight, in a sum of adapters.

An adapter keeps offsets from the rows that the base has. A folder holds these rows too: what was trained is
their sum, and a base whose new tokens start elsewhere gets the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lowrank.adapters import plan_of
from lowrank.layers.bases import master_dtype
from lowrank.layers.layer import AdaptedLayer
from lowrank.layers.offsets import TokenOffsets
from lowrank.layers.tree import hung_at, original, without_copies
from lowrank.models.tokens import TokenRows
from lowrank.plan import Plan
from lowrank.processes import whole

PREFIX = "rows:"  # before the names of these tensors


def offsets_of(root: nn.Module, name: str) -> dict[TokenRows, TokenOffsets]:
    """What trains the rows of each embedding, of the adapter ``name``."""
    found = {}
    for rows in plan_of(root, name).rows:
        tokens = cast(AdaptedLayer, without_copies(hung_at(root, rows.module))).part(name).tokens
        assert tokens is not None
        found[rows] = tokens
    return found


def weight_of(model: nn.Module, rows: TokenRows) -> nn.Parameter:
    """The weight that has ``rows``, in a model that may be wrapped."""
    return cast(nn.Parameter, original(hung_at(model, rows.module))._parameters["weight"])


# -- in a folder --------------------------------------------------------------------------------------


def offset_tensors(root: nn.Module, name: str) -> dict[str, Tensor]:
    """The offsets of the adapter ``name``, as a folder names them."""
    return {f"{PREFIX}{rows.module}.offsets": t.offsets for rows, t in offsets_of(root, name).items()}


def start_tensors(root: nn.Module, name: str) -> dict[str, Tensor]:
    """The rows that the base has, as a folder names them: (ids, dim), in the base's dtype."""
    found = {}
    for rows in plan_of(root, name).rows:
        weight = whole(weight_of(root, rows).detach())
        if weight.is_meta:
            raise ValueError(f"{rows.module} is on the meta device: load the base first")
        found[f"{PREFIX}{rows.module}.start"] = weight[torch.tensor(rows.ids, device=weight.device)].clone()
    return found


def wanted_tensors(plan: Plan) -> dict[str, tuple[tuple[int, ...], bool]]:
    """The shapes of both, by name; all are floating point."""
    return {
        f"{PREFIX}{rows.module}.{part}": ((len(rows.ids), rows.width), True)
        for rows in plan.rows
        for part in ("offsets", "start")
    }


def read_offsets(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The offsets from the rows that ``model`` has, of those that a folder holds, by module path.

    They are the saved ones where the model has the rows that they were trained on.
    """
    return {
        rows.module: offsets_from(
            weight_of(model, rows),
            rows,
            tensors[f"{PREFIX}{rows.module}.start"],
            tensors[f"{PREFIX}{rows.module}.offsets"],
        )
        for rows in plan.rows
    }


def offsets_from(weight: Tensor, rows: TokenRows, start: Tensor, offsets: Tensor | None = None) -> Tensor:
    """What must be added to the rows of ``weight`` to give ``start + offsets``, in a master's dtype."""
    offsets = torch.zeros_like(start, dtype=master_dtype(weight.dtype)) if offsets is None else offsets
    if weight.is_meta:
        return offsets
    weight = whole(weight.detach())
    here = weight[torch.tensor(rows.ids, device=weight.device)].cpu()
    if torch.equal(here, start.to(here.dtype)) and start.dtype == here.dtype:
        return offsets
    return ((start.double() - here.double()) + offsets.double()).to(offsets.dtype)


def left_aside(model: nn.Module, plan: Plan) -> dict[int, tuple[int, ...]]:
    """The rows that the plan trains, by the id of the weight: there the base may have other values."""
    return {id(weight_of(model, rows)): rows.ids for rows in plan.rows}


# -- merging and combining ----------------------------------------------------------------------------


@torch.no_grad()
def merge_rows(root: nn.Module, chosen: Mapping[str, Tensor | None]) -> None:
    """Adds the offsets of the adapters ``chosen`` to the weights, in fp32, each with its weight.

    A weight that several modules share gets them once.
    """
    sums: dict[int, tuple[nn.Parameter, dict[int, Tensor]]] = {}
    for module in root.modules():
        if not isinstance(module, AdaptedLayer):
            continue
        weight = module.base._parameters.get("weight")
        if weight is None or id(weight) in sums:
            continue
        moved: dict[int, Tensor] = {}
        for name, factor in chosen.items():
            tokens = module._parts()[name].tokens if name in module.adapters else None
            if tokens is not None:
                for i, offset in zip(tokens.ids, tokens.scaled(factor), strict=True):
                    moved[i] = moved[i] + offset if i in moved else offset
        sums[id(weight)] = weight, moved
    for weight, moved in sums.values():
        if moved:
            ids = torch.tensor(list(moved), device=weight.device)
            offsets = torch.stack(list(moved.values()))
            weight.data[ids] = (weight.data[ids].to(offsets.dtype) + offsets).to(weight.dtype)


def check_rows_mergeable(root: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError where offsets cannot be added to the weight."""
    for name in names:
        for rows, tokens in offsets_of(root, name).items():
            if weight_of(root, rows).is_meta:
                raise ValueError(f"{rows.module} is on the meta device: there is nothing yet to add to")
            if not tokens.offsets.isfinite().all():
                raise ValueError(
                    f"the rows of {rows.module} that {name!r} trains hold NaN or Inf, and merging would "
                    "write them into the weight"
                )


@torch.no_grad()
def combined_rows(
    root: nn.Module, shares: Mapping[str, float]
) -> tuple[tuple[TokenRows, ...], dict[str, Tensor]]:
    """The weighted sum of the offsets of several adapters: the rows that any of them has, and the offsets."""
    terms: dict[str, list[tuple[float, TokenRows, Tensor]]] = {}
    for name, share in shares.items():
        for rows, tokens in offsets_of(root, name).items():
            terms.setdefault(rows.module, []).append((share, rows, tokens.offsets))
    made, sums = [], {}
    for module, held in terms.items():
        ids = sorted({i for _, rows, _ in held for i in rows.ids})
        place = {i: at for at, i in enumerate(ids)}
        total = held[0][2].new_zeros(len(ids), held[0][1].width)
        for share, rows, offsets in held:
            total[[place[i] for i in rows.ids]] += share * offsets
        made.append(TokenRows(module, tuple(ids), held[0][1].width))
        sums[module] = total
    return tuple(made), sums
