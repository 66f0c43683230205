"""How a module stores a stack of experts: which of its tensors hold one, which way round, and for what.

It looks at shapes and attributes, and changes nothing. transformers' classes say ``is_transposed`` and
``is_concatenated``; where a class says nothing, the shapes of its two tensors tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lowrank.linalg.rows import Rows, repeating
from lowrank.models.families import Role

GATED, UNGATED = ("gate_up_proj", "down_proj"), ("up_proj", "down_proj")
FLAT = ("w1", "v1", "w2")  # DBRX: gate, up and down, each with the experts' rows one after the other


@dataclass(frozen=True)
class Stack:
    """One tensor of experts: ``(experts, out, in)``, or ``(experts, in, out)`` where it is ``transposed``.

    Args:
        bands: what the output rows of each expert are for, counted within one expert.
        flat: stored in two dimensions, as ``(experts · out, in)``, or ``(experts · in, out)``. The module
            above the one that holds it multiplies by it.
    """

    experts: int
    out: int
    columns: int
    transposed: bool
    bands: tuple[tuple[Role, Rows], ...]
    flat: bool = False

    def matrices(self, stored: Tensor) -> Tensor:
        """``stored`` with the experts in a dimension of their own: a view."""
        return stored.view(self.experts, -1, stored.shape[-1]) if self.flat else stored


def stacks_of(module: nn.Module) -> dict[str, Stack]:
    """The tensors of experts in ``module`` itself, by parameter; none where nothing tells the layout."""
    for names in (GATED, UNGATED):
        up, down = (module._parameters.get(name) for name in names)
        if up is not None and down is not None and up.dim() == down.dim() == 3:
            return _pair(module, names, up, down)
    return _flat(module)


def stack_of(module: nn.Module, param: str) -> Stack | None:
    return None if module._parameters.get(param) is None else stacks_of(module).get(param)


def within_experts(model: nn.Module, path: str, param: str) -> bool:
    """Is this weight one of several experts, of a stack or of a list of modules?"""
    parts = path.split(".")
    listed = any(a == "experts" and b.isdigit() for a, b in pairwise(parts))
    return listed or stack_of(model.get_submodule(path), param) is not None


def active_experts(model: nn.Module, path: str) -> int:
    """How many experts act on one token, as the configuration nearest to the experts at ``path`` says.

    Raises ValueError where none says it.
    """
    parts = path.split(".")
    for i in range(len(parts), -1, -1):
        above = model.get_submodule(".".join(parts[:i]))
        config = getattr(above, "config", None)
        for said in (getattr(config, "num_experts_per_tok", None), getattr(above, "top_k", None)):
            if isinstance(said, int) and said > 0:
                return said
    raise ValueError(
        f"{path}: no config.num_experts_per_tok says how many experts act on a token: use "
        'expert_rank="rank", or ranks= for them'
    )


def _pair(module: nn.Module, names: tuple[str, str], up: Tensor, down: Tensor) -> dict[str, Stack]:
    gated, said = names == GATED, getattr(module, "is_transposed", None)
    ways = [said] if isinstance(said, bool) else [False, True] if gated else []
    for transposed in ways:
        experts, rows, columns = _sizes(up, transposed)
        hidden = rows // 2 if gated else rows
        if _sizes(down, transposed) == (experts, columns, hidden) and not torch.is_complex(up):
            if gated and rows % 2:
                break
            bands = _gate_up(hidden, interleaved=getattr(module, "is_concatenated", True) is False)
            return {
                names[0]: Stack(
                    experts, rows, columns, transposed, bands if gated else ((Role.UP, (0, rows)),)
                ),
                names[1]: Stack(experts, columns, hidden, transposed, ((Role.DOWN, (0, columns)),)),
            }
    return {}


def _flat(module: nn.Module) -> dict[str, Stack]:
    experts = getattr(module, "moe_num_experts", None)
    held = [module._parameters.get(name) for name in FLAT]
    shapes = {None if each is None else tuple(each.shape) for each in held}
    shape = shapes.pop()
    if shapes or shape is None or len(shape) != 2 or not isinstance(experts, int) or shape[0] % experts:
        return {}
    hidden, width = shape[0] // experts, shape[1]
    made = (
        Stack(experts, hidden, width, False, ((Role.GATE, (0, hidden)),), True),
        Stack(experts, hidden, width, False, ((Role.UP, (0, hidden)),), True),
        Stack(experts, width, hidden, True, ((Role.DOWN, (0, width)),), True),
    )
    return dict(zip(FLAT, made, strict=True))


def _gate_up(hidden: int, *, interleaved: bool) -> tuple[tuple[Role, Rows], ...]:
    """Gate, then up, or row by row in turn."""
    if interleaved:
        return (Role.GATE, repeating(0, 1, 2, hidden)), (Role.UP, repeating(1, 1, 2, hidden))
    return (Role.GATE, (0, hidden)), (Role.UP, (hidden, 2 * hidden))


def _sizes(tensor: Tensor, transposed: bool) -> tuple[int, int, int]:
    experts, out, columns = tensor.shape
    return (experts, columns, out) if transposed else (experts, out, columns)
