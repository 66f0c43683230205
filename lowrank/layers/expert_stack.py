"""The adapters of one tensor of experts, kept as one pair of tensors for each kind of rows: gate, up, down.

Parameters and what they add up to; the products are in `experts`. One `Adapter` for each expert is a view.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.layers.adapter import Adapter
from lowrank.layers.functional import Block
from lowrank.layers.offsets import TokenOffsets
from lowrank.linalg.precision import without_autocast
from lowrank.linalg.rows import Rows, shifted, spread


class Layout(NamedTuple):
    """A tensor ``(experts, out, in)``, or ``(experts, in, out)`` where it is stored ``transposed``.

    ``shared``: one adapter is for all experts.
    """

    experts: int
    out: int
    transposed: bool
    shared: bool = False


class ExpertStack(nn.Module):
    """``ΔW[e][rows] = scaling_e · B[e]·A[e]``: A ``(experts, r, in)`` and B ``(experts, rows, r)``.

    Where the experts share one adapter these are A ``(1, r, in)`` and B ``(1, rows, r)``.

    An expert of lower rank is padded with zeros, which a mask keeps out of every product; rank 0 is no
    adapter. Anchors are those of `Adapter`.

    Args:
        adapters: by expert; all have the same ``frozen`` and the same rows within their expert. One that is
            shared is that of expert 0.
        rows: these rows, counted within one expert.
    """

    A: nn.Parameter
    B: nn.Parameter
    A0: Tensor | None
    B0: Tensor | None
    mask: Tensor | None

    def __init__(
        self, adapters: Mapping[int, Adapter], rows: Rows, experts: int, shared: bool = False
    ) -> None:
        super().__init__()
        self.experts, experts = experts, 1 if shared else experts
        first = next(iter(adapters.values()))
        self.rows, self.frozen = rows, first.frozen
        self.ranks = tuple(adapters[e].rank if e in adapters else 0 for e in range(experts))
        self.scalings = tuple(adapters[e].scaling if e in adapters else 0.0 for e in range(experts))
        self.anchored = tuple(e in adapters and adapters[e].anchored for e in range(experts))
        most = max(self.ranks)

        def stacked(name: str, like: Tensor) -> Tensor:
            shape = (most, like.shape[1]) if name[0] == "A" else (like.shape[0], most)
            made = like.new_zeros(experts, *shape)
            for e, adapter in adapters.items():
                factor = getattr(adapter, name)
                if factor is not None:
                    made[e, : factor.shape[0], : factor.shape[1]] = factor.detach()
            return made

        for name in ("A", "B"):
            factor = nn.Parameter(stacked(name, getattr(first, name)), name not in self.frozen)
            self.register_parameter(name, factor)
            anchor = stacked(f"{name}0", getattr(first, name)) if any(self.anchored) else None
            self.register_buffer(f"{name}0", anchor)
        even = len({rank for rank in self.ranks if rank}) == 1
        mask = torch.arange(most) < torch.tensor(self.ranks).unsqueeze(1)
        self.register_buffer("mask", None if even else mask.to(self.A.device), persistent=False)

    def trained(self) -> Iterator[nn.Parameter]:
        """The factors that are trained, whether they require grad now or not."""
        yield from (factor for name, factor in self.named_parameters() if name not in self.frozen)

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """A, B, A0, B0, with zeros where the rank of an expert ends."""
        if self.mask is None:
            return self.A, self.B, self.A0, self.B0
        A, B = self.A * self.mask.unsqueeze(2), self.B * self.mask.unsqueeze(1)
        return A, B, self.A0, self.B0

    def pair(self, weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """A ``(experts, R, in)``, B ``(experts, rows, R)`` and a scaling for all, anchors included."""
        A, B, A0, B0 = self.factors()
        if A0 is not None and B0 is not None:
            A, B = torch.cat((A0 + A, A), 1), torch.cat((B, B0), 2)
        scalings = {scaling for scaling, rank in zip(self.scalings, self.ranks, strict=True) if rank}
        scaling = scalings.pop() if len(scalings) == 1 else 1.0
        if scalings:
            B = B * torch.tensor(self.scalings, dtype=B.dtype, device=B.device).view(-1, 1, 1)
        if weight is not None:
            B = B * weight
        return A.to(dtype), B.to(dtype), scaling

    def blocks(self, weight: Tensor | None = None) -> list[Block | None]:
        """What the fused product of each expert takes, with its rows; None for one without an adapter."""
        A, B, A0, B0 = self.factors()
        if weight is not None:
            B, B0 = B * weight, None if B0 is None else B0 * weight
        none = [None] * len(self.ranks)
        every = zip(
            A.unbind(),
            B.unbind(),
            none if A0 is None else A0.unbind(),
            none if B0 is None else B0.unbind(),
            strict=True,
        )
        made = [
            Block(self.rows, a, b, self.scalings[e], a0, b0) if self.ranks[e] else None
            for e, (a, b, a0, b0) in enumerate(every)
        ]
        return made * (self.experts // len(made))

    def held(self, expert: int, out: int) -> Adapter:
        """The adapter of one expert, whose tensors, and gradients where there are any, are views."""
        rank = self.ranks[expert]
        state = {"A": self.A.detach()[expert, :rank], "B": self.B.detach()[expert, :, :rank]}
        if self.anchored[expert] and self.A0 is not None and self.B0 is not None:
            state |= {"A0": self.A0[expert, :rank], "B0": self.B0[expert, :, :rank]}
        rows = shifted(self.rows, expert * out)
        adapter = Adapter.from_state(state, self.scalings[expert], rows=rows, frozen=self.frozen)
        if self.A.grad is not None:
            adapter.A.grad = self.A.grad[expert, :rank]
        if self.B.grad is not None:
            adapter.B.grad = self.B.grad[expert, :, :rank]
        return adapter

    def extra_repr(self) -> str:
        low, high = min(rank for rank in self.ranks if rank), max(self.ranks)
        rank = str(high) if low == high else f"{low} to {high}"
        shared = "" if len(self.ranks) == self.experts else "shared by "
        return f"{shared}experts={self.experts}, ({self.B.shape[1]}, {self.A.shape[2]}), rank={rank}"


class ExpertStacks(nn.ModuleList):
    """All that one name does to one tensor of experts: an `ExpertStack` for each kind of rows."""

    def __init__(self, adapters: Iterable[Adapter], layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        kinds: dict[tuple[Rows, frozenset[str]], dict[int, Adapter]] = {}
        for adapter in adapters:
            expert = adapter.rows[0] // layout.out
            rows = shifted(adapter.rows, -expert * layout.out)
            kinds.setdefault((rows, adapter.frozen), {})[expert] = adapter
        for (rows, _), held in kinds.items():
            self.append(ExpertStack(held, rows, layout.experts, layout.shared))

    def stacks(self) -> list[ExpertStack]:
        return cast("list[ExpertStack]", list(self._modules.values()))

    @property
    def height(self) -> int:
        """The rows of all experts."""
        return self.layout.experts * self.layout.out

    def held(self) -> list[Adapter]:
        """One adapter for each expert, or one for all, and kind of rows, views of the stacks."""
        experts = 1 if self.layout.shared else self.layout.experts
        places = ((e, stack) for e in range(experts) for stack in self.stacks())
        return [stack.held(e, self.layout.out) for e, stack in places if stack.ranks[e]]

    def blocks(self) -> list[Block]:
        """What is added to each expert, with its rows in the whole tensor."""
        every = ((e, block) for stack in self.stacks() for e, block in enumerate(stack.blocks()))
        out = self.layout.out
        return [block._replace(rows=shifted(block.rows, e * out)) for e, block in every if block is not None]

    def add_to(self, weight: Tensor, factor: Tensor | None) -> Tensor:
        """W + ΔW in full, ``(experts, out, in)``, added in fp32 (fp64 for fp64 factors); differentiable."""
        for stack in self.stacks():
            A, B, scaling = stack.pair(factor, torch.promote_types(torch.float32, stack.A.dtype))
            with without_autocast(weight):
                if stack.rows == (0, self.layout.out) and not self.layout.shared:
                    weight = torch.baddbmm(weight.to(A.dtype), B, A, alpha=scaling)
                else:
                    update = spread(torch.bmm(B, A).mT, stack.rows, self.layout.out).mT
                    weight = weight.to(A.dtype) + scaling * update
        return weight


def trained_within(module: nn.Module) -> Iterator[nn.Parameter]:
    """What the adapters below ``module`` train."""
    for each in module.modules():
        if isinstance(each, (Adapter, ExpertStack, TokenOffsets)):
            yield from each.trained()


def padded(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A ``(experts, R, in)`` and B ``(experts, rows, R)`` with R a multiple of 16 bytes."""
    zeros = -A.shape[1] % (16 // A.itemsize)
    return (F.pad(A, (0, 0, 0, zeros)), F.pad(B, (0, zeros))) if zeros else (A, B)
