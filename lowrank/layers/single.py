"""The autograd function of one adapter over all rows: what is multiplied, in which order, and what is kept.

The common case, written straight down, because on small projections every line of Python shows.
`row_blocks` is the general case. Both trust their arguments, which `ops` lays out.
"""

from __future__ import annotations

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
    owned,
    scaled,
    through_up,
    up,
)


def _gradients(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    """dS = s·dY·B; dB = s·(Sᵀ·dY)ᵀ; dA = dSᵀ·x; dX = dS·A, then += dY·W."""
    x, weight, mask, S, A, B, low, high = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_A = ctx.needs_input_grad[:4]
    dX = dW = db = dA = None
    dy = flat(dY).contiguous()
    dS, dB = through_up(dy, high, S, ctx.scaling, B, needs_x or needs_A)
    if needs_A:
        # Beside an anchor A meets x twice, in A0 + A and in A, and its gradient is the sum.
        dT = dS if dS.shape[1] == len(A) else dS[:, : len(A)] + dS[:, len(A) :]
        dA = gradient(dT, flat(x) if mask is None else flat(x) * mask, A)
    if needs_x:
        dX = dS @ low
        if mask is not None:
            dX.mul_(mask)
        accumulate(dX, dy, weight)  # the large product onto the small one: no pass of its own
        dX = dX if dY.dim() == 2 else dX.view(*dY.shape[:-1], dX.shape[1])
    if needs_weight:
        dW = dy.t() @ flat(x)
    if needs_bias:
        db = dy.sum(0)
    return dX, dW, db, dA, dB, None, None, None, None, None


class SingleProduct(torch.autograd.Function):
    """``y = x·Wᵀ + bias + scaling · x·Aᵀ·Bᵀ``: three products forward, five backward.

    With anchors A0, B0 the pair is ``[A0 + A; A]``, ``[B, B0]``. `mask` is True where dropout keeps x. Kept
    are S = x·Aᵀ, x where A or the weight is trained, the weight, and the factors as they were multiplied by:
    in half precision these are copies, ``r·(in + out)`` entries, which backward need not cast again. Not
    `exact`, the base product accumulates onto the update, which reads y once less.
    """

    backward = staticmethod(differentiable_once(_gradients))

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        A0: Tensor | None,
        B0: Tensor | None,
        mask: Tensor | None,
        scaling: float,
        exact: bool,
    ) -> Tensor:
        x2, low, high = flat(x), down(A, A0, x.dtype), up(B, B0, x.dtype)
        right = high.t()
        S = (x2 if mask is None else x2 * mask) @ low.t()
        if exact:
            y = F.linear(x, weight, bias).contiguous()
            accumulate(flat(y), S, right, scaling)
        else:
            y = scaled(S, right, scaling) if bias is None else torch.addmm(bias, S, right, alpha=scaling)
            accumulate(y, x2, weight.t())
            y = y.view(*x.shape[:-1], y.shape[1])
        needs_x, needs_weight, _, needs_A, needs_B = ctx.needs_input_grad[:5]
        ctx.scaling = scaling
        ctx.save_for_backward(
            x if needs_A or needs_weight else None,
            weight if needs_x else None,
            mask if needs_A or needs_x else None,
            S if needs_B else None,
            *(A, B),
            low if needs_x else None,
            high if needs_A or needs_x else None,
        )
        return owned(y)
