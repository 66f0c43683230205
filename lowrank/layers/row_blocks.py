"""The autograd function of several adapters on row blocks of one weight, or beside a base that was called.

One pass over x serves all blocks. `single` is the common case, where one block has all rows; what is said
there of order and memory holds here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.layers.gemm import (
    accumulate,
    differentiable_once,
    down,
    flat,
    gradient,
    joined,
    owned,
    through_up,
    up,
)
from lowrank.linalg.rows import Rows, take, view

_FIRST = 6  # of the factors among the arguments: A, B, A0, B0 of each block


def _gradients(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask, S, *factors = ctx.saved_tensors
    A, B, A0, B0 = factors[::4], factors[1::4], factors[2::4], factors[3::4]
    needs_x, needs_base, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    needs_A, needs_B = ctx.needs_input_grad[_FIRST::4], ctx.needs_input_grad[_FIRST + 1 :: 4]
    dX = dW = db = None
    dA: list[Tensor | None] = [None] * len(A)
    dB: list[Tensor | None] = [None] * len(B)
    dS, dT = [], []  # gradients of S: all of it, and what of it reaches each A
    dy = flat(dY).contiguous()

    column = 0
    for i, (rows, scaling) in enumerate(ctx.spans):
        right = up(B[i], B0[i], dy.dtype)
        part = S[:, column : column + right.shape[1]] if needs_B[i] else None
        dyi = take(dy, rows, dim=1)
        dSi, dB[i] = through_up(dyi, right, part, scaling, B[i], needs_x or any(needs_A))
        dS.append(dSi)
        if any(needs_A):
            dT.append(dSi if A0[i] is None else dSi[:, : len(A[i])] + dSi[:, len(A[i]) :])
        column += right.shape[1]

    if any(needs_A):
        product, row = gradient(joined(dT, 1), flat(x) if mask is None else flat(x) * mask, A[0]), 0
        for i, a in enumerate(A):
            dA[i] = product[row : row + len(a)].to(a.dtype) if needs_A[i] else None
            row += len(a)
    if needs_x:
        dX = joined(dS, 1) @ _downs(A, A0, dy.dtype)
        if mask is not None:
            dX.mul_(mask)
        if weight is not None:
            accumulate(dX, dy, weight)
        dX = dX.view(*dY.shape[:-1], dX.shape[1])
    if needs_weight:
        dW = dy.t() @ flat(x)
    if needs_bias:
        db = dy.sum(0)
    dFactors = (grad for pair in zip(dA, dB, strict=True) for grad in (*pair, None, None))
    return dX, dY if needs_base else None, dW, db, None, None, *dFactors


def _downs(A: Sequence[Tensor], A0: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    return joined([down(a, a0, dtype) for a, a0 in zip(A, A0, strict=True)])


class RowBlockProduct(torch.autograd.Function):
    """``y = base + Σ scaling · x·Aᵀ·Bᵀ``, each term on its own rows.

    The base is ``F.linear(x, weight, bias)``, or `base` where that is given. `mask` is True where dropout
    keeps x. A span is ``(rows, scaling)`` of one block, and its factors are ``A, B, A0, B0``.
    """

    backward = staticmethod(differentiable_once(_gradients))

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        spans: list[tuple[Rows, float]],
        *factors: Any,
    ) -> Tensor:
        A, B, A0, B0 = factors[::4], factors[1::4], factors[2::4], factors[3::4]
        y = base.clone() if weight is None else F.linear(x, weight, bias)  # type: ignore[union-attr]
        y = y.contiguous()
        x2, y2, column = flat(x), flat(y), 0
        S = (x2 if mask is None else x2 * mask) @ _downs(A, A0, x.dtype).t()
        for i, (rows, scaling) in enumerate(spans):
            right = up(B[i], B0[i], x.dtype)
            accumulate(view(y2, rows, dim=1), S[:, column : column + right.shape[1]], right.t(), scaling)
            column += right.shape[1]
        ctx.spans = spans
        needs_x, _, needs_weight = ctx.needs_input_grad[:3]
        needs_A, needs_B = any(ctx.needs_input_grad[_FIRST::4]), any(ctx.needs_input_grad[_FIRST + 1 :: 4])
        ctx.save_for_backward(
            x if needs_A or needs_weight else None,
            weight if needs_x else None,
            mask if needs_A or needs_x else None,
            S if needs_B else None,
            *factors,
        )
        return owned(y)
