"""The autograd function under `ops`: what is multiplied, in which order, and what is kept for backward.

It trusts its arguments, which `ops` checks and lays out; nothing else calls it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class LowRankProduct(torch.autograd.Function):
    """``y = base + Σ scaling · x·Aᵀ·Bᵀ`` over row blocks: three products forward, five backward.

    The base is ``F.linear(x, weight, bias)``, or `base` where that is given. `mask` is True where dropout
    keeps x. A span is ``(start, stop, scaling)`` of one block, and its factors are ``A, B, A0, B0``.
    Forward: S = x·Aᵀ; y = base; y += s·S·Bᵀ; not `exact`, y = s·S·Bᵀ; y += x·Wᵀ, which takes one block over
    all rows. Backward: dS = s·dY·B; dB = s·(Sᵀ·dY)ᵀ; dA = dSᵀ·x;
    dX = dS·A; dX += dY·W. Kept are x (where an A or the weight is trained), S, and the factors and weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        exact: bool,
        spans: list[tuple[int, int, float]],
        *factors: Any,
    ) -> Tensor:
        A, B, A0, B0 = factors[::4], factors[1::4], factors[2::4], factors[3::4]
        x2 = _flat(x)
        S = (x2 if mask is None else x2 * mask) @ _down(A, A0, x.dtype).t()
        if exact or weight is None:
            y = base.clone() if weight is None else F.linear(x, weight, bias)  # type: ignore[union-attr]
            y = y.contiguous()
            y2, column = _flat(y), 0
            for i, (start, stop, scaling) in enumerate(spans):
                up = _up(B[i], B0[i], x.dtype)
                part = _columns(S, column, column + up.shape[1])
                _accumulate(_columns(y2, start, stop), part, up.t(), scaling)
                column += up.shape[1]
        else:
            up = _up(B[0], B0[0], x.dtype).t()
            y = _product(S, up, spans[0][2]) if bias is None else torch.addmm(bias, S, up, alpha=spans[0][2])
            _accumulate(y, x2, weight.t(), 1.0)
            y = y.view(*x.shape[:-1], y.shape[1])

        needs_x, _, needs_weight, _, _, _, _, *needs = ctx.needs_input_grad
        ctx.spans, ctx.needs = spans, (needs[::4], needs[1::4])
        train_A, train_B = True in needs[::4], True in needs[1::4]
        ctx.save_for_backward(
            x if train_A or needs_weight else None,
            weight if needs_x else None,
            mask if train_A or needs_x else None,
            S if train_B else None,
            *factors,
        )
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        run = _backward_once if torch.is_grad_enabled() else _backward
        if torch.is_autocast_enabled(dY.device.type):
            with torch.autocast(dY.device.type, enabled=False):
                return run(ctx, dY)
        return run(ctx, dY)


def _backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask, S, *factors = ctx.saved_tensors
    A, B, A0, B0 = factors[::4], factors[1::4], factors[2::4], factors[3::4]
    needs_x, needs_base, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    needs_A, needs_B = ctx.needs
    train_A = True in needs_A
    dy = _flat(dY).contiguous()
    x2: Any = None if x is None else _flat(x)
    dX = dW = db = None
    dA: list[Tensor | None] = [None] * len(A)
    dB: list[Tensor | None] = [None] * len(B)
    dS, dT = [], []  # gradients of S: all of it, and what of it reaches each A

    column = 0
    for i, (start, stop, scaling) in enumerate(ctx.spans):
        rank, dy_rows, up = A[i].shape[0], _columns(dy, start, stop), _up(B[i], B0[i], dy.dtype)
        part = _columns(S, column, column + up.shape[1]) if needs_B[i] else None
        dS_i, dB_i = _through_B(dy_rows, up, part, scaling, rank, needs_x or train_A)
        if dB_i is not None:
            dB[i] = torch.empty_like(B[i]).copy_(dB_i)
        if dS_i is not None:
            dS.append(dS_i)
        if train_A:
            # Beside an anchor A meets x twice, in A0 + A and in A, and its gradient is the sum.
            dT.append(dS[i] if A0[i] is None else dS[i][:, :rank] + dS[i][:, rank:])
        column += up.shape[1]

    if train_A:
        product, row = _join(dT).t() @ (x2 if mask is None else x2 * mask), 0
        for i, a in enumerate(A):
            if needs_A[i]:
                dA[i] = product[row : row + a.shape[0]].to(a.dtype)
            row += a.shape[0]
    if needs_x:
        dX = _join(dS) @ _down(A, A0, dy.dtype)
        if mask is not None:
            dX.mul_(mask)
        if weight is not None:
            _accumulate(dX, dy, weight, 1.0)  # the large product onto the small one: no pass of its own
        dX = dX.view(*dY.shape[:-1], dX.shape[1]) if dY.dim() != 2 else dX
    if needs_weight:
        dW = dy.t() @ x2
    if needs_bias:
        db = dy.sum(0)
    dFactors = (grad for pair in zip(dA, dB, strict=True) for grad in (*pair, None, None))
    return dX, dY if needs_base else None, dW, db, None, None, None, *dFactors


_kernels: Any = None  # the module, once switched on


def one_pass(on: bool = True) -> None:
    """Let backward take dS and dB from one pass over dY, by a Triton kernel, where `kernels.suits` says so.

    That is on CUDA, in half precision and for ranks up to about 32. Off until it is asked for: what it gains
    has not been measured on a GPU yet. Needs Triton, else ImportError. It is a switch of the process.
    """
    global _kernels
    _kernels = importlib.import_module("lowrank.layers.kernels") if on else None


_backward_once = once_differentiable(_backward)


def _through_B(
    dY: Tensor, up: Tensor, S: Tensor | None, scaling: float, rank: int, wants_S: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``dS = s·dY·B`` if asked for, and ``dB = s·dYᵀ·S`` of the first `rank` columns if S is there."""
    if S is not None and wants_S and _kernels is not None and _kernels.suits(dY, up.shape[1]):
        dS, dB = _kernels.dS_and_dB(dY, up, S, scaling)
        return dS, dB[:, :rank]
    dS = _product(dY, up, scaling) if wants_S else None
    # (Sᵀ·dY)ᵀ, not dYᵀ·S: the same numbers, but it reads dY along its rows.
    return dS, None if S is None else _product(_columns(S, 0, rank).t(), dY, scaling).t()


def _down(A: Sequence[Tensor], A0: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """All that x is multiplied by, ``(Σ width, in)``: A, or ``[A0 + A; A]`` beside an anchor."""
    if len(A) == 1 and A0[0] is None:
        return A[0].to(dtype)
    pairs = zip(A, A0, strict=True)
    return torch.cat([part for a, a0 in pairs for part in ((a,) if a0 is None else (a0 + a, a))]).to(dtype)


def _up(B: Tensor, B0: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What multiplies a block's columns of S, ``(rows, width)``: B, or ``[B, B0]`` beside an anchor."""
    return (B if B0 is None else torch.cat((B, B0), 1)).to(dtype)


def _columns(whole: Tensor, start: int, stop: int) -> Tensor:
    return whole if stop - start == whole.shape[1] else whole[:, start:stop]


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _flat(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """``alpha·a·b``: with beta = 0 the scale rides along, where mm and mul_ would be two passes."""
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=alpha)


def _accumulate(C: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """``C += alpha·a·b`` in place, compiled or not."""
    if torch.compiler.is_compiling():
        _addmm_(C, a, b, alpha)
    else:
        C.addmm_(a, b, alpha=alpha)


# The compiler makes addmm_ functional, and then copies all of C; an operation of ours it leaves in place.
@torch.library.custom_op("lowrank::addmm_", mutates_args={"C"})
def _addmm_(C: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    C.addmm_(a, b, alpha=alpha)
