"""Roles that no name tells: by the shapes of a block's layers, and by who consumes whose output.

A block of two layers that widens and narrows again has an up and a down. All else is tried out on a copy of
the block, or of the module around it, with random numbers: see `consumers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from math import prod

from torch import nn
from torch.nn.parameter import is_lazy

from lowrank.models.calls import likely_calls
from lowrank.models.consumers import roles_by_use
from lowrank.models.copies import NoCopyError, can_be_copied
from lowrank.models.families import Role, in_attention, is_feed_forward
from lowrank.models.influence import CPU, Call, Trial, refilled
from lowrank.models.layouts import Blocks, in_order
from lowrank.models.storage import declared_shape, is_linear
from lowrank.models.trials import once
from lowrank.models.unnoticed import unnoticed

LAYERS = 16  # a block that is tried has no more linear layers than this,
TIMES, SMALL = 16, 4_000_000  # and no more parameters than this times those of the layer in question, or this


def blocks_by_structure(model: nn.Module, path: str) -> Blocks | None:
    """Roles and rows of the linear layer ``path``; None where its structure tells nothing."""
    parent = path.rpartition(".")[0]
    if not in_attention(parent):
        for around in (parent, *_feed_forwards(parent)):
            said = is_feed_forward(around.rpartition(".")[2])
            roles = _up_and_down(model.get_submodule(around), said=said)
            if (role := roles.get(path[len(around) :].lstrip("."))) is not None:
                return in_order([(role, _rows(model, path))])
    return blocks_by_trial(model, path)


def _feed_forwards(path: str) -> list[str]:
    """The nearest path above that is called a feed-forward block, if there is one."""
    parts = path.split(".")
    above = [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]
    return [each for each in above if is_feed_forward(each.rpartition(".")[2])][:1]


def blocks_by_trial(model: nn.Module, path: str) -> Blocks | None:
    """What `consumers` finds of the linear layer ``path`` in the smallest block that shows it; else None."""
    for around in blocks_around(model, path):
        found = tried(model.get_submodule(around)).get(path[len(around) :].lstrip("."))
        if found:
            return found
    return None


def blocks_around(model: nn.Module, path: str) -> Iterator[str]:
    """Paths of the modules around the layer ``path`` that may be tried, the smallest first."""
    numbers = prod(declared_shape(model.get_submodule(path)) or ())
    above, levels = path, 2
    while above and levels:
        above = above.rpartition(".")[0]
        block = model.get_submodule(above)
        if isinstance(block, nn.ModuleList | nn.ModuleDict):
            continue
        levels -= not isinstance(block, nn.Sequential)
        few = sum(1 for _ in islice(filter(is_linear, block.modules()), LAYERS + 1)) <= LAYERS
        if not few or any(is_lazy(p) for p in block.parameters()):
            continue
        if sum(p.numel() for p in block.parameters()) <= max(SMALL, TIMES * numbers):
            yield above


def tried(block: nn.Module) -> Mapping[str, Blocks]:
    """Roles and rows of the layers of ``block`` by path, of the first call that shows any."""
    if not can_be_copied(block) or type(block).forward is nn.Module.forward:
        return {}
    shapes = tuple(declared_shape(module) for module in block.modules() if is_linear(module))
    return once(block, ("use", shapes), lambda: tried_with(block, likely_calls(block)))


def tried_with(block: nn.Module, calls: Iterable[Call]) -> Mapping[str, Blocks]:
    """What the first of ``calls`` shows that shows any; they get a copy of ``block`` on the CPU, in fp64."""
    with unnoticed(CPU):
        try:
            copy = refilled(block)
        except NoCopyError:
            return {}
        for call in calls:
            try:
                found = roles_by_use(Trial(copy, call))
            except Exception:  # whatever a stranger's code raises: nothing was seen
                continue
            if found:
                return found
    return {}


def _rows(model: nn.Module, path: str) -> int:
    shape = declared_shape(model.get_submodule(path))
    assert shape is not None
    return shape[0]


def _up_and_down(block: nn.Module, *, said: bool) -> Mapping[str, Role]:
    """Roles of the two layers of ``block``, if these are all that it holds and it is a feed-forward block.

    Args:
        said: its name says that it is one: the first is the up, whatever their widths.
    """
    linear = ((path, module) for path, module in block.named_modules() if path and is_linear(module))
    shapes = {path: declared_shape(module) for path, module in islice(linear, 3)}  # of many, 3 say enough
    if len(shapes) != 2:
        return {}
    (first, up), (last, down) = shapes.items()
    if up is None or down is None:
        return {}
    inner = "." in first + last  # in modules of their own: one must fit the other
    if (said and (not inner or up[0] == down[1])) or (not inner and up[0] > up[1] and up == down[::-1]):
        return {first: Role.UP, last: Role.DOWN}
    return {}
