"""Adapts the products with a tensor of experts, so that their cost and memory follow the tokens.

The product with one expert's slice, grouped products, batched ones: the base's own call comes first, and the
update of the tokens that it has is added. `linalg.stacks` says which calls these are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.layers.expert_stack import ExpertStacks, Layout, padded
from lowrank.layers.functional import Block, fused_lora, transformed
from lowrank.layers.gemm import differentiable_once
from lowrank.layers.grouped_mm import grouped, outer
from lowrank.linalg.rows import Rows, spread, take, view
from lowrank.linalg.stacks import StackedWeight

Pair = tuple[Rows, Tensor, Tensor, float]  # rows within an expert, A, B and the scaling
Part = tuple[ExpertStacks, Tensor | None]  # what acts on a tensor, and the factor of its ΔW


def adapted_experts(weight: Tensor, parts: Sequence[Part]) -> Tensor:
    """``weight`` for whatever multiplies by it; under `torch.func` W + ΔW in full."""
    low = LowRank(weight, parts)
    return (
        low.whole().reshape(weight.shape)
        if transformed()
        else StackedWeight.show(weight, low, low.transposed, None)
    )


class LowRank:
    """What acts on one tensor of experts, in the forms that products take, each made once a forward."""

    def __init__(self, weight: Tensor, parts: Sequence[Part]) -> None:
        self.weight, self.parts = weight, parts
        layout: Layout = parts[0][0].layout
        self.experts, self.transposed = layout.experts, layout.transposed
        self._blocks: list[list[Block]] | None = None
        self._pairs: dict[torch.dtype, list[Pair]] = {}
        self._whole: Tensor | None = None

    def blocks(self, expert: int) -> list[Block]:
        if self._blocks is None:
            stacks = [stack.blocks(factor) for part, factor in self.parts for stack in part.stacks()]
            self._blocks = [
                [block for block in each if block is not None] for each in zip(*stacks, strict=True)
            ]
        return self._blocks[expert]

    def pairs(self, dtype: torch.dtype) -> list[Pair]:
        """Rows within an expert, A ``(experts, R, in)``, B ``(experts, rows, R)`` and the scaling.

        In place of the experts there is 1 where they share one adapter.
        """
        if dtype not in self._pairs:
            self._pairs[dtype] = [
                (stack.rows, *stack.pair(factor, dtype))
                for part, factor in self.parts
                for stack in part.stacks()
            ]
        return self._pairs[dtype]

    def whole(self) -> Tensor:
        """W + ΔW, stored as W is, but in three dimensions."""
        if self._whole is None:
            weight = self.weight.view(self.experts, -1, self.weight.shape[-1])
            weight = weight.mT if self.transposed else weight
            made = weight
            for part, factor in self.parts:
                made = part.add_to(made, factor)
            made = made.to(weight.dtype)
            self._whole = made.mT if self.transposed else made
        return self._whole

    def one(self, x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
        """``F.linear(x, weight, bias)`` of one expert's tokens, weight ``(out, in)``."""
        blocks = self.blocks(expert)
        return fused_lora(x, weight, bias, blocks) if blocks else F.linear(x, weight, bias)

    def batch(self, y: Tensor, x: Tensor, pick: Tensor | None) -> Tensor:
        """``y`` (n, tokens, out) plus the updates of x (n, tokens, in): of expert i, or of ``pick[i]``."""
        x = x.to(y.dtype)
        for rows, A, B, scaling in self.pairs(y.dtype):
            if len(A) == 1:
                update = F.linear(F.linear(x, A[0]), B[0])
            else:
                A, B = (A, B) if pick is None else (A[pick], B[pick])
                update = torch.bmm(torch.bmm(x, A.mT), B.mT)
            y = y + spread(scaling * update, rows, y.shape[-1])
        return y

    def group(self, y: Tensor, x: Tensor, offs: Tensor, multiply: Callable[..., Tensor]) -> Tensor:
        """``y`` (tokens, out), written to, plus the updates of x (tokens, in), sorted by expert."""
        x, pairs = x.to(y.dtype), self.pairs(y.dtype)
        add = _composed if torch.compiler.is_compiling() else _added
        for some, ends in (
            ([pair for pair in pairs if len(pair[1]) > 1], offs),
            ([pair for pair in pairs if len(pair[1]) == 1], offs[-1:]),  # all tokens are one group
        ):
            if some:
                y = add(y, x, ends, multiply, some)
        return y


def _added(y: Tensor, x: Tensor, offs: Tensor, multiply: Callable[..., Tensor], pairs: list[Pair]) -> Tensor:
    factors = [factor for _, A, B, _ in pairs for factor in padded(A, B)]
    native = "fallback" not in str(multiply)
    spans = [(rows, scaling) for rows, _, _, scaling in pairs]
    return _GroupedUpdate.apply(y, x, offs, native, spans, *factors)


def _composed(
    y: Tensor, x: Tensor, offs: Tensor, multiply: Callable[..., Tensor], pairs: list[Pair]
) -> Tensor:
    """The same of the base's own grouped product, which compilers know."""
    for rows, A, B, scaling in pairs:
        A, B = padded(A, B)
        update = multiply(multiply(x, A.mT, offs=offs), B.mT, offs=offs)
        y = y + spread(scaling * update, rows, y.shape[-1])
    return y


class _GroupedUpdate(torch.autograd.Function):
    """``y[g][:, rows] += scaling · x[g]·A[g]ᵀ·B[g]ᵀ`` for each group of rows; kept are x and x·Aᵀ."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        offs: Tensor,
        native: bool,
        spans: list[tuple[Rows, float]],
        *factors: Any,
    ) -> Tensor:
        ctx.mark_dirty(y)
        A, column = torch.cat(factors[::2], 1) if len(spans) > 1 else factors[0], 0
        S = grouped(x, A.mT, offs, native)
        for (rows, scaling), B in zip(spans, factors[1::2], strict=True):
            part = S[:, column : column + B.shape[2]]
            part.mul_(scaling)
            own = view(y, rows, dim=1)
            own.add_(grouped(part, B.mT, offs, native).view(own.shape))
            column += B.shape[2]
        ctx.spans, ctx.native = spans, native
        ctx.save_for_backward(x if any(ctx.needs_input_grad[5::2]) else None, offs, S, A, *factors[1::2])
        return y

    @staticmethod
    def _gradients(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        x, offs, S, A, *up = ctx.saved_tensors
        needs_y, needs_x = ctx.needs_input_grad[:2]
        needs_A, needs_B = ctx.needs_input_grad[5::2], ctx.needs_input_grad[6::2]
        dS, dB, column = torch.empty_like(S), [], 0
        for i, ((rows, scaling), B) in enumerate(zip(ctx.spans, up, strict=True)):
            columns = slice(column, column + B.shape[2])
            dy = take(dY, rows, dim=1)
            dB.append(outer(dy, S[:, columns], offs, ctx.native) if needs_B[i] else None)
            torch.mul(grouped(dy, B, offs, ctx.native), scaling, out=dS[:, columns])
            column += B.shape[2]
        dX = grouped(dS, A, offs, ctx.native) if needs_x else None
        dA: Sequence[Tensor | None] = [None] * len(up)
        if any(needs_A):
            dA = outer(dS, x, offs, ctx.native).split([B.shape[2] for B in up], 1)
        factors = (grad for pair in zip(dA, dB, strict=True) for grad in pair)
        return dY if needs_y else None, dX, None, None, None, *factors

    backward = staticmethod(differentiable_once(_gradients.__func__))  # type: ignore[attr-defined]
