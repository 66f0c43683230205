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

from lowrank.layers.casts import Copies
from lowrank.layers.gemm import accumulate, differentiable_once, down, flat, gradient, owned, through_up, up
from lowrank.linalg.rows import Rows, take, view

_FIRST = 7  # of the factors among the arguments: A, B, A0, B0 of each block


def _gradients(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask, S, low, *rest = ctx.saved_tensors
    highs, factors = rest[: len(ctx.spans)], rest[len(ctx.spans) :]
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
        right = up(B[i], B0[i], dy.dtype) if highs[i] is None else highs[i]
        part = S[:, column : column + right.shape[1]] if needs_B[i] else None
        dyi = take(dy, rows, dim=1)
        dSi, dB[i] = through_up(dyi, right, part, scaling, B[i], needs_x or any(needs_A))
        dS.append(dSi)
        if any(needs_A):
            dT.append(dSi if A0[i] is None else dSi[:, : len(A[i])] + dSi[:, len(A[i]) :])
        column += right.shape[1]

    if any(needs_A):
        product, row = gradient(_joined(dT, 1), flat(x) if mask is None else flat(x) * mask, A[0]), 0
        for i, a in enumerate(A):
            dA[i] = product[row : row + len(a)].to(a.dtype) if needs_A[i] else None
            row += len(a)
    if needs_x:
        dX = _joined(dS, 1) @ (_downs(A, A0, dy.dtype, ctx.copies) if low is None else low)
        if mask is not None:
            dX.mul_(mask)
        if weight is not None:
            accumulate(dX, dy, weight)
        dX = dX.view(*dY.shape[:-1], dX.shape[1])
    if needs_weight:
        dW = dy.t() @ flat(x)
    if needs_bias:
        db = dy.sum(0)
    for copies in ctx.copies:
        if copies is not None:
            copies.spend()
    dFactors = (grad for pair in zip(dA, dB, strict=True) for grad in (*pair, None, None))
    return dX, dY if needs_base else None, dW, db, None, None, None, *dFactors


def _downs(
    A: Sequence[Tensor], A0: Sequence[Tensor | None], dtype: torch.dtype, copies: Sequence[Copies | None]
) -> Tensor:
    return _joined([down(*each[:2], dtype, each[2]) for each in zip(A, A0, copies, strict=True)], 0)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


class RowBlockProduct(torch.autograd.Function):
    """``y = base + Σ scaling · x·Aᵀ·Bᵀ``, each term on its own rows.

    The base is ``F.linear(x, weight, bias)``, or `base` where that is given. `mask` is True where dropout
    keeps x. A span is ``(rows, scaling)`` of one block, and its factors are ``A, B, A0, B0``; `copies` has
    them in x's dtype where they were made for all layers.
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
        copies: list[Copies | None],
        *factors: Any,
    ) -> Tensor:
        A, B, A0, B0 = factors[::4], factors[1::4], factors[2::4], factors[3::4]
        y = base.clone() if weight is None else F.linear(x, weight, bias)  # type: ignore[union-attr]
        y = y.contiguous()
        x2, y2, column = flat(x), flat(y), 0
        low = _downs(A, A0, x.dtype, copies)
        S = (x2 if mask is None else x2 * mask) @ low.t()
        for i, (rows, scaling) in enumerate(spans):
            right = up(B[i], B0[i], x.dtype, copies[i])
            accumulate(view(y2, rows, dim=1), S[:, column : column + right.shape[1]], right.t(), scaling)
            column += right.shape[1]
        ctx.spans, ctx.copies = spans, copies
        needs_x, _, needs_weight = ctx.needs_input_grad[:3]
        needs_A, needs_B = any(ctx.needs_input_grad[_FIRST::4]), any(ctx.needs_input_grad[_FIRST + 1 :: 4])
        ctx.save_for_backward(
            x if needs_A or needs_weight else None,
            weight if needs_x else None,
            mask if needs_A or needs_x else None,
            S if needs_B else None,
            low if needs_x and copies[0] is not None else None,  # else they are made again
            *(None if each is None else each.high for each in copies),
            *factors,
        )
        return owned(y)
