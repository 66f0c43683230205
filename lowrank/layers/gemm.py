"""The few matrix operations that the low-rank products are made of, each in its cheapest form.

Measured choices live here; what is multiplied with what is not decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from lowrank.linalg.precision import autocasts, without_autocast


def flat(t: Tensor) -> Tensor:
    """``(..., n)`` as ``(tokens, n)``."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def owned(y: Tensor) -> Tensor:
    """``y``, and where it is a view, without a copy one that autograd does not take for a view.

    What follows may write in place into the output of a layer (``nn.ReLU(inplace=True)``); into a view that
    a Function returns it may not.
    """
    view = y.dim() > 2 if torch.compiler.is_compiling() else y._is_view()
    return torch.ops.aten._unsafe_view(y, y.shape) if view else y


def scaled(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """``alpha·a·b``: with beta = 0 the scale rides along, where mm and mul_ would be two passes."""
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=alpha)


def accumulate(C: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """``C += alpha·a·b`` in place, compiled or not.

    a ``(N, r)``, b ``(r, columns)``; C ``(N, columns)``, or ``(N, pieces, size)`` where these lie apart.
    """
    if torch.compiler.is_compiling():
        _addmm_(C, a, b, alpha)
    elif C.dim() == 2:
        C.addmm_(a, b, alpha=alpha)
    else:
        _addmm_pieces_(C, a, b, alpha)


def _addmm_pieces_(C: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    parts = C.transpose(0, 1)
    pieces = rearrange(b, "r (pieces size) -> pieces r size", pieces=len(parts))
    if pieces.shape[2] < 16:  # of interleaved gate and up: too many to go one by one
        C.add_((a @ b).view(C.shape), alpha=alpha)
    elif C.is_cuda:
        parts.baddbmm_(a.expand(len(parts), *a.shape), pieces, alpha=alpha)
    else:  # one by one: oneDNN knows no such strides
        for part, piece in zip(parts, pieces, strict=True):
            part.addmm_(a, piece, alpha=alpha)


# The compiler makes addmm_ functional, and then copies all of C; an operation of ours it leaves in place.
@torch.library.custom_op("lowrank::addmm_", mutates_args={"C"})
def _addmm_(C: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    if C.dim() == 2:
        C.addmm_(a, b, alpha=alpha)
    else:
        _addmm_pieces_(C, a, b, alpha)


def gradient(a: Tensor, b: Tensor, like: Tensor, alpha: float = 1.0) -> Tensor:
    """``alpha·aᵀ·b``, the gradient of the factor ``like``, in its dtype. a ``(N, rows)``, b ``(N, columns)``.

    CUDA sums half precision in fp32: there an fp32 gradient is that sum, not rounded and not cast.
    """
    direct = a.is_cuda and a.dtype != like.dtype == torch.float32
    if not direct or torch.compiler.is_compiling():
        product = a.t() @ b if alpha == 1 else scaled(a.t(), b, alpha)
        return product.to(like.dtype)
    sums = torch.empty(a.shape[1], b.shape[1], dtype=like.dtype, device=a.device)
    return torch.addmm(sums, a.t(), b, out_dtype=like.dtype, beta=0, alpha=alpha)


def joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat` without the copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def down(A: Tensor, A0: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What x is multiplied by: A ``(r, in)``, or ``[A0 + A; A]`` beside an anchor."""
    return cast_to(A if A0 is None else torch.cat((A0 + A, A)), dtype)


def up(B: Tensor, B0: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What multiplies that: B ``(rows, r)``, or ``[B, B0]`` beside an anchor."""
    return cast_to(B if B0 is None else torch.cat((B, B0), 1), dtype)


def cast_to(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, which takes a microsecond also where there is nothing to do."""
    return t if t.dtype is dtype else t.to(dtype)


def through_up(
    dY: Tensor, up: Tensor, S: Tensor | None, alpha: float, like: Tensor, needs_S: bool
) -> tuple[Any, Any]:
    """Gradients of S and of B through ``alpha·S·upᵀ``: ``alpha·dY·up`` and ``alpha·dYᵀ·S``, or None.

    dY ``(N, rows)``, up ``(rows, width)``, S ``(N, width)`` or None where B needs none. The second is that of
    the first columns, those of `like`, which is B: the rest are an anchor's.
    """
    dS = dB = None
    if S is not None:
        S = S if S.shape[1] == like.shape[1] else S[:, : like.shape[1]]
        if dY.is_cuda:
            dB = gradient(dY, S, like, alpha)
        else:  # (Sᵀ·dY)ᵀ, not dYᵀ·S: the same numbers, but it reads dY along its rows
            dB = torch.empty_like(like).copy_(scaled(S.t(), dY, alpha).t())
    if needs_S:
        dS = scaled(dY, up, alpha)
    return dS, dB


class _Once(torch.autograd.Function):
    """The identity, which cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "an adapted layer (LoRALinear) can be differentiated once, and a second derivative was taken "
            "through it: use torch.func (grad, vjp, jvp, hessian) for that, or merge the adapters first"
        )


def differentiable_once(gradients: Callable[..., tuple]) -> Callable[..., Any]:
    """A backward that runs `gradients` outside autocast, and whose results refuse to be differentiated."""

    def refusing(ctx: Any, *dY: Tensor | None) -> tuple:
        with torch.no_grad():
            grads = gradients(ctx, *dY)
        made = [i for i, grad in enumerate(grads) if grad is not None]
        # From inputs that require grad, so that a second derivative meets the refusal.
        once = _Once.apply(*(grads[i].detach().requires_grad_() for i in made))
        return tuple(once[made.index(i)] if i in made else None for i in range(len(grads)))

    def backward(ctx: Any, *dY: Tensor | None) -> tuple:
        run = refusing if torch.is_grad_enabled() else gradients
        if not torch._C._is_any_autocast_enabled():
            return run(ctx, *dY)
        cast = [d for d in dY if d is not None and autocasts(d)]
        if cast:
            with without_autocast(cast[0]):
                return run(ctx, *dY)
        return run(ctx, *dY)

    return backward
