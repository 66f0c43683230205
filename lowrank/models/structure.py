"""Roles of feed-forward blocks whose names say nothing: by the shapes of their layers, and by a trial.

A block of two layers that widens and narrows again has an up and a down; of three, the down is the one that
narrows, and of the two others the gate is the one that the output does not depend on in proportion.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.models.families import Role, in_attention, is_feed_forward
from lowrank.models.storage import declared_shape, is_linear
from lowrank.models.trials import copied, is_plain, once, unnoticed

TOKENS = 4
LINEAR, BENT = 1e-6, 1e-3  # relative, in fp64


def role_by_structure(model: nn.Module, path: str) -> Role:
    """The role of the linear layer ``path`` in its block; `Role.OTHER` where its structure tells none."""
    parent_path, _, leaf = path.rpartition(".")
    if in_attention(parent_path):
        return Role.OTHER
    said = is_feed_forward(parent_path.rpartition(".")[2])
    return _roles(model.get_submodule(parent_path), said=said).get(leaf, Role.OTHER)


def _roles(block: nn.Module, *, said: bool) -> Mapping[str, Role]:
    """Roles of the layers of ``block``, if these are all that it holds and it is a feed-forward block.

    Args:
        said: its name says that it is one: of two layers the first is the up, whatever their widths.
    """
    linear = (named for named in block.named_children() if is_linear(named[1]))
    shapes = {name: declared_shape(child) for name, child in islice(linear, 4)}  # of many, 4 say enough
    if len(shapes) not in (2, 3) or sum(map(is_linear, block.modules())) != len(shapes):
        return {}
    if said and len(shapes) == 2:
        return dict(zip(shapes, (Role.UP, Role.DOWN), strict=True))
    narrow = [name for name, shape in shapes.items() if shape and shape[0] < shape[1]]
    if len(narrow) != 1 or (len(shapes) == 2 and narrow != [*shapes][1:]):
        return {}
    last, first = narrow[0], [name for name in shapes if name not in narrow]
    narrows = shapes[last]
    if narrows is None or any(shapes[name] != narrows[::-1] for name in first):
        return {}
    if len(first) == 1:
        return {first[0]: Role.UP, last: Role.DOWN}
    gate = _gate(block, first, narrows[0])
    if gate is None:  # two branches of another kind
        return {}
    return {last: Role.DOWN} | {name: Role.GATE if name == gate else Role.UP for name in first}


def _gate(block: nn.Module, names: list[str], columns: int) -> str | None:
    """Which of two layers goes through an activation before they are multiplied; None if that is not seen."""
    tensors = [*block.parameters(), *block.buffers()]
    if not all(map(is_plain, tensors)):
        return None
    return once(block, ("gate", *names, columns), lambda: _try_gate(block, names, columns))


def _try_gate(block: nn.Module, names: list[str], columns: int) -> str | None:
    draw = torch.Generator().manual_seed(0)

    def random(tensor: Tensor) -> Tensor:
        numbers = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        return (numbers / max(1, tensor.shape[-1]) ** 0.5).to(tensor.device)

    device = next(block.parameters()).device
    with unnoticed(device):
        copy = copied(block, random)
        x = torch.randn(1, TOKENS, columns, generator=draw, dtype=torch.float64).to(device)
        times = dict.fromkeys(names, 1.0)

        def hook(name: str) -> Any:
            return lambda module, args, y: y * times[name]

        for name in names:
            copy.get_submodule(name).register_forward_hook(hook(name))
        try:
            bends = {name: _bend(copy, x, times, name) for name in names}
        except Exception:  # whatever a stranger's code raises: nothing was seen
            return None
    up, gate = sorted(names, key=lambda name: bends[name])
    return gate if bends[up] <= LINEAR and bends[gate] > BENT else None


def _bend(copy: Any, x: Tensor, times: dict[str, float], name: str) -> float:
    """How far the output is from being in proportion to what the layer ``name`` gives; 0 where it is."""
    outputs = []
    for factor in (0.0, 1.0, 2.0, -1.0):  # ReLU is in proportion above 0, and a sigmoid less ½ is odd
        times[name] = factor
        outputs.append(copy(x))
    times[name] = 1.0
    none, as_is, twice, turned = outputs
    change = as_is - none
    bends = (twice - none - 2 * change).norm(), (turned - none + change).norm()
    return float(max(bends) / change.norm())
