"""The fused low-rank product: a frozen projection and its adapters as one differentiable operation.

Plain tensors in, a plain tensor out. It knows no module and no model, owns no parameter and chooses no rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Block(NamedTuple):
    """One adapter on the output rows ``[start, stop)`` of a weight: ``ΔW[rows] = scaling · B·A``.

    A is ``(r, in)``, B is ``(stop - start, r)``; any floating dtype. With an anchor, A0 ``(r, in)`` and
    B0 ``(stop - start, r)`` are the start and A, B are the offsets from it (zero at first):
    ``ΔW[rows] = scaling · (B·(A0 + A) + B0·A)``. Anchors are constants: they get no gradient.
    """

    rows: tuple[int, int]
    A: Tensor
    B: Tensor
    scaling: float
    A0: Tensor | None = None
    B0: Tensor | None = None


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """``x·Wᵀ + bias + scaling · (x·Aᵀ)·Bᵀ`` as one differentiable operation.

    x ``(..., in)``; weight ``(out, in)``, any strides; bias ``(out,)`` or None; A ``(r, in)``;
    B ``(out, r)``. Returns ``(..., out)`` in x's dtype. The one-block case of `fused_lora`, which says more.
    """
    return fused_lora(x, weight, bias, (Block((0, weight.shape[0]), A, B, scaling),))


def fused_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Sequence[Block], *, dropout: float = 0.0
) -> Tensor:
    """``F.linear(x, weight, bias)`` plus the update of every block, in one pass over x.

    x ``(..., in)``, weight ``(out, in)`` of any strides, bias ``(out,)`` or None; returns ``(..., out)``.
    The base product comes first, by the very call that a frozen projection makes, so that an update of
    zero leaves its value bit for bit. Factors of another dtype are cast to x's; their gradients come back
    in their own. Under autocast all runs in autocast's dtype. `dropout` is the share of x's entries that
    is hidden from the adapters, and from them alone: a caller passes it in training only.

    For backward it keeps x itself (only where an A or the weight is trained) and the ``(tokens, Σr)``
    product of x with the A's. The gradients are those of LoRA (2106.09685, section 4.1). It can be
    differentiated once: a second derivative raises RuntimeError. Shapes that do not fit: ValueError.
    """
    _check(x, weight.shape[0], weight.shape[1], blocks, dropout)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _apply(x, None, weight, bias, blocks, dropout)


def add_lora(y: Tensor, x: Tensor, blocks: Sequence[Block], *, dropout: float = 0.0) -> Tensor:
    """``y`` plus the update of every block: for a base that can only be called (quantized, or special).

    y ``(..., out)`` is what the base made of x ``(..., in)``; it is not written to. The update is computed
    in y's dtype, and an update of zero returns y bit for bit. Otherwise as `fused_lora`.
    """
    _check(x, y.shape[-1], x.shape[-1], blocks, dropout)
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"x {tuple(x.shape)} and y {tuple(y.shape)} must agree in all but the last dimension"
        )
    return _apply(x.to(y.dtype), y, None, None, blocks, dropout)


def _apply(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    blocks: Sequence[Block],
    dropout: float,
) -> Tensor:
    mask = _mask(x, dropout) if dropout > 0 else None
    # What dropout keeps is to weigh more: the scaling does that, and no pass over x has to.
    scalings = tuple(block.scaling / (1 - dropout) for block in blocks)
    rows = tuple(block.rows for block in blocks)
    factors = [factor for block in blocks for factor in (block.A, block.B, block.A0, block.B0)]
    return _LoRA.apply(x, y, weight, bias, mask, rows, scalings, *factors)


def _mask(x: Tensor, dropout: float) -> Tensor:
    """True where x is kept, ``(tokens, in)``. It is kept for backward: drawing it again takes longer."""
    shape = (x.shape[:-1].numel(), x.shape[-1])
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout)
    # bernoulli_ draws one number an entry; here each draw makes four, to the nearest 1/65536.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    return draws.view(torch.int16)[: x.numel()].view(shape) >= round(dropout * 2**16) - 2**15


def _blocks(rows: Sequence[tuple[int, int]], scalings: Sequence[float], factors: Sequence) -> list[Block]:
    """The blocks again, of what `_apply` made of them: autograd sees only tensors that are arguments."""
    return [
        Block(span, A, B, scaling, A0, B0)
        for span, scaling, A, B, A0, B0 in zip(
            rows, scalings, factors[::4], factors[1::4], factors[2::4], factors[3::4], strict=True
        )
    ]


def _width(block: Block) -> int:
    return block.A.shape[0] * (1 if block.A0 is None else 2)


def _down(blocks: Sequence[Block], dtype: torch.dtype) -> Tensor:
    """All that x is multiplied by, ``(Σ width, in)``: A, or ``[A0 + A; A]`` beside an anchor."""
    parts = [p for b in blocks for p in ((b.A,) if b.A0 is None else (b.A0 + b.A, b.A))]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def _up(block: Block, dtype: torch.dtype) -> Tensor:
    """What multiplies the block's columns of S, ``(rows, width)``: B, or ``[B, B0]`` beside an anchor."""
    return (block.B if block.B0 is None else torch.cat((block.B, block.B0), 1)).to(dtype)


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


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


_FACTORS = 7  # where they begin among the arguments of _LoRA


class _LoRA(torch.autograd.Function):
    """The product, and a backward that does each product once and keeps no more than it must."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        rows: tuple[tuple[int, int], ...],
        scalings: tuple[float, ...],
        *factors: Tensor | None,
    ) -> Tensor:
        blocks = _blocks(rows, scalings, factors)
        y = base.clone() if weight is None else F.linear(x, weight, bias)  # type: ignore[union-attr]
        y = y.contiguous()
        y2, x2 = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        S = (x2 if mask is None else x2 * mask) @ _down(blocks, x.dtype).t()
        for block, part in zip(blocks, S.split([_width(b) for b in blocks], 1), strict=True):
            _accumulate(y2[:, slice(*block.rows)], part, _up(block, x.dtype).t(), block.scaling)

        needs = ctx.needs_input_grad
        needs_A, needs_B = any(needs[_FACTORS::4]), any(needs[_FACTORS + 1 :: 4])
        ctx.rows, ctx.scalings, ctx.shape = rows, scalings, x.shape
        ctx.save_for_backward(
            x if needs_A or needs[2] else None,
            weight if needs[0] else None,
            mask if needs_A or needs[0] else None,
            S if needs_B else None,
            *factors,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        device = dY.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            return _backward(ctx, dY)


def _backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask, S, *factors = ctx.saved_tensors
    needs_x, needs_base, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    needs_A, needs_B = ctx.needs_input_grad[_FACTORS::4], ctx.needs_input_grad[_FACTORS + 1 :: 4]
    blocks = _blocks(ctx.rows, ctx.scalings, factors)
    ranks, widths = [b.A.shape[0] for b in blocks], [_width(b) for b in blocks]
    dy = dY.reshape(-1, dY.shape[-1]).contiguous()
    dys = [dy[:, slice(*b.rows)] for b in blocks]
    x2 = None if x is None else x.reshape(-1, x.shape[-1])
    dX = None
    dFactors: list[Tensor | None] = [None] * len(factors)

    if any(needs_B):
        for i, part in enumerate(S.split(widths, 1)):
            if needs_B[i]:
                # (Sᵀ·dY)ᵀ, not dYᵀ·S: the same numbers, but it reads dY along its rows.
                dB = _product(part[:, : ranks[i]].t(), dys[i], blocks[i].scaling).t()
                dFactors[4 * i + 1] = dB.to(blocks[i].B.dtype).contiguous()
    if needs_x or any(needs_A):
        parts = [_product(d, _up(b, dy.dtype), b.scaling) for b, d in zip(blocks, dys, strict=True)]
        dS = _join(parts)
    if any(needs_A):
        # Beside an anchor A meets x twice, in A0 + A and in A, and its gradient is the sum.
        sums = [d if d.shape[1] == r else d[:, :r] + d[:, r:] for d, r in zip(parts, ranks, strict=True)]
        dA = (dS if ranks == widths else _join(sums)).t() @ (x2 if mask is None else x2 * mask)
        for i, part in enumerate(dA.split(ranks)):
            if needs_A[i]:
                dFactors[4 * i] = part.to(blocks[i].A.dtype)
    if needs_x:
        dX = dS @ _down(blocks, dy.dtype)
        if mask is not None:
            dX.mul_(mask)
        if weight is not None:
            _accumulate(dX, dy, weight, 1.0)  # the large product onto the small one: no pass of its own
        dX = dX.view(ctx.shape)
    dW = dy.t() @ x2 if needs_weight else None
    db = dy.sum(0) if needs_bias else None
    return dX, dY if needs_base else None, dW, db, None, None, None, *dFactors


def _check(x: Tensor, out_features: int, in_features: int, blocks: Sequence[Block], dropout: float) -> None:
    if not blocks:
        raise ValueError("without blocks there is nothing to add: call the base alone")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a share of x in [0, 1), not {dropout}")
    if x.shape[-1] != in_features:
        raise ValueError(f"x {tuple(x.shape)} must end in the weight's {in_features} input features")
    for (start, stop), A, B, _, A0, B0 in blocks:
        if not 0 <= start < stop <= out_features:
            raise ValueError(f"rows ({start}, {stop}) must lie within the weight's {out_features} rows")
        rank = A.shape[0]
        if A.shape != (rank, in_features) or B.shape != (stop - start, rank):
            raise ValueError(
                f"A {tuple(A.shape)} and B {tuple(B.shape)} must be ({rank}, {in_features}) and "
                f"({stop - start}, {rank}) to update rows ({start}, {stop})"
            )
        if (A0 is None) != (B0 is None):
            raise ValueError("an anchor needs both A0 and B0")
        if A0 is not None and B0 is not None and (A0.shape != A.shape or B0.shape != B.shape):
            raise ValueError(
                f"the anchor's A0 {tuple(A0.shape)} and B0 {tuple(B0.shape)} must have the shapes "
                f"of its offsets, {tuple(A.shape)} and {tuple(B.shape)}"
            )
