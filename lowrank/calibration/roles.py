"""Roles that neither names nor a trial of a module alone tell: the model is run once, on a given batch.

What the modules around such layers are called with is kept, and copies of them are tried with it. The model
stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lowrank.batches import Loss, model_device, to_device
from lowrank.calibration.undisturbed import undisturbed
from lowrank.linalg.rows import height, pieces
from lowrank.models.copies import can_be_copied
from lowrank.models.families import Role
from lowrank.models.fused import GROUPS, credible
from lowrank.models.influence import CPU, Call
from lowrank.models.layouts import Blocks
from lowrank.models.patterns import matches, starred
from lowrank.models.projections import scan
from lowrank.models.storage import declared_shape, is_linear
from lowrank.models.structure import blocks_around, tried_with

T = TypeVar("T")


class FoundRoles(NamedTuple):
    """What `find_roles` found, as a `Policy` takes it: ``Policy(**found._asdict())``.

    Args:
        roles: of layers of one role, by pattern.
        fused: rows by role of fused weights, by pattern.
    """

    roles: dict[str, str]
    fused: dict[str, dict[str, int]]


def find_roles(model: nn.Module, batch: Any, *, loss: Loss | None = None) -> FoundRoles:
    """Roles of the linear layers of ``model`` whose role is not known, by who consumes whose output.

    The model is called once with ``batch``, in evaluation mode, which may be small: one example of a few
    tokens does. What it shows of a layer holds for all layers of the same place and shape.

    Args:
        batch: a mapping, with which the model is called; or what ``loss`` takes.
        loss: ``loss(model, batch)`` calls the model; what it gives is not used.

    Raises:
        ValueError: there is no ``loss``, and the batch is no mapping.
    """
    if loss is None and not isinstance(batch, Mapping):
        raise ValueError(f"expected a mapping, or loss=, which calls the model, got {type(batch).__name__}")
    around = {
        p.module: list(blocks_around(model, p.module))
        for p, doubt in scan(model).items()
        if p.role == Role.OTHER and not p.block and (doubt is None or (doubt.roles and doubt.adaptable))
    }
    kinds: dict[Any, str] = {}  # of blocks that are alike, the first
    for block in dict.fromkeys(block for blocks in around.values() for block in blocks):
        if can_be_copied(model.get_submodule(block)):
            kinds.setdefault(_kind(model, block), block)
    calls = _recorded(model, batch, loss, list(kinds.values()))
    shown = {
        kind: tried_with(model.get_submodule(block), [calls[block]])
        for kind, block in kinds.items()
        if block in calls
    }
    found: dict[str, Blocks] = {}
    for path, blocks in around.items():
        for block in blocks:
            own = shown.get(_kind(model, block), {}).get(path[len(block) :].lstrip("."))
            if own and credible(model, path, own):
                found.setdefault(path, own)
    alone = {path: own[0][0].value for path, own in found.items() if len(own) == 1}
    divided = {path: _as_said(own) for path, own in found.items() if len(own) > 1}
    return FoundRoles(_by_pattern(model, alone), _by_pattern(model, divided))


def _kind(model: nn.Module, path: str) -> Any:
    block = model.get_submodule(path)
    shapes = tuple(declared_shape(module) for module in block.modules() if is_linear(module))
    return type(block), starred(path), shapes


def _recorded(model: nn.Module, batch: Any, loss: Loss | None, blocks: list[str]) -> dict[str, Call]:
    """How each of ``blocks`` was called first."""
    calls: dict[str, Call] = {}

    def record(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if path not in calls:
                kept = _kept(args), _kept(kwargs)
                calls[path] = lambda trial: trial(*_kept(kept[0]), **_kept(kept[1]))

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(record(path), with_kwargs=True) for path in blocks
    ]
    try:
        with undisturbed(model), torch.no_grad():
            batch = to_device(batch, model_device(model))
            model(**batch) if loss is None else loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _kept(value: Any) -> Any:
    """A copy on the CPU that later calls do not change; floating-point numbers in fp64."""
    if isinstance(value, Tensor):
        return value.detach().to(CPU, torch.float64 if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, dict):
        return {key: _kept(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_kept, value))
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever a stranger's object is
        return value


def _as_said(blocks: Blocks) -> dict[str, int]:
    """Rows by role, as `Policy.fused` takes them."""
    groups = len(pieces(blocks[0][1]))
    sizes = {role.value: height(rows) // groups for role, rows in blocks}
    return sizes if groups == 1 else {GROUPS: groups, **sizes}


def _by_pattern(model: nn.Module, found: Mapping[str, T]) -> dict[str, T]:
    """The same with ``*`` for numbers, where all layers that a pattern names are found to be the same."""
    layers = [path for path, module in model.named_modules() if path and is_linear(module)]
    made: dict[str, T] = {}
    for path, what in found.items():
        pattern = starred(path)
        same = all(found.get(other) == what for other in layers if matches(other, pattern))
        made[pattern if same else path] = what
    return made
