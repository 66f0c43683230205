"""Projections that read the same x (query, key and value; gate and up) computed in one pass over it.

`SharedProduct` is the mathematics, `SharedInput` what lets separate layers have it. Which layers belong
together is decided elsewhere; whether they really are called with the same x is seen here, at each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.layers.gemm import accumulate, differentiable_once, down, flat, owned, through_up, up
from lowrank.layers.ops import Block, to_autocast


class Member(NamedTuple):
    """One projection of a group: weight ``(out, in)``, bias or None, and one block over all its rows."""

    weight: Tensor
    bias: Tensor | None
    block: Block


class Shares(Protocol):
    """A layer that can be computed as a member of a group."""

    def member(self) -> Member | None:
        """What it would multiply now; None where it has to be called by itself."""
        ...


def fused_group(x: Tensor, members: Sequence[Member]) -> tuple[Tensor, ...]:
    """``fused_lora`` of every member on the same x ``(..., in)``: one output each.

    One pass over x gives all x·Aᵀ, one gives all gradients of A, and the parts of dX accumulate onto one
    another. An update of zero leaves each output the base's, bit for bit. It can be differentiated once.
    """
    scalings = [member.block.scaling for member in members]
    tensors: list[Tensor | None] = []
    for weight, bias, (_, A, B, _, A0, B0) in members:
        moved, weight, bias = to_autocast(x, weight, bias)
        tensors += [weight, bias, A, B, A0, B0]
    return SharedProduct.apply(moved, scalings, *tensors)


class SharedInput:
    """Layers that a model calls one after another with the same x: the first call computes all of them.

    A layer asks for its output in its own forward, and gets None where it has to compute it by itself:
    without gradients, under the compiler, or once it has been seen that the model does not call all of
    them with the same x. What was computed is handed out only to a call with the same tensor x, unchanged,
    and unchanged factors, under the same autocast; each output is handed out once.
    """

    def __init__(self, layers: Sequence[Shares]) -> None:
        self.layers = list(layers)
        self.apart = False
        self._x: Tensor | None = None
        self._waiting: dict[int, tuple[Tensor, tuple]] = {}

    def __call__(self, layer: Shares, x: Tensor) -> Tensor | None:
        if self.apart or not torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_inference():
            return None
        place = next((i for i, known in enumerate(self.layers) if known is layer), None)
        if place is None:  # a replica of one of them
            return None
        if x is self._x and place in self._waiting:
            y, stamp = self._waiting.pop(place)
            if stamp == self._stamp(x, layer.member()):
                if not self._waiting:
                    self._forget()
                return y
        elif self._waiting and x is not self._x:
            self._forget()
            self.apart = True
            return None
        return self._compute(place, x)

    def _compute(self, place: int, x: Tensor) -> Tensor | None:
        self._forget()
        members = [layer.member() for layer in self.layers]
        if None in members:
            return None
        outputs = fused_group(x, members)  # type: ignore[arg-type]
        stamps = [self._stamp(x, member) for member in members]
        self._x, self._waiting = x, dict(enumerate(zip(outputs, stamps, strict=True)))
        return self._waiting.pop(place)[0]

    @staticmethod
    def _stamp(x: Tensor, member: Member | None) -> tuple:
        """Changes whenever the output of that member on x might."""
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if member is None:
            return ()
        tensors = (x, member.weight, member.bias, *member.block[1:3])
        return autocast, *((t.data_ptr(), t._version) for t in tensors if t is not None)

    def _forget(self) -> None:
        self._x, self._waiting = None, {}

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "apart": self.apart}  # a copy starts with nothing computed

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


_EACH = 6  # tensors a member: weight, bias, A, B, A0, B0


def _gradients(ctx: Any, *dYs: Tensor | None) -> tuple[Tensor | None, ...]:
    x, S, *tensors = ctx.saved_tensors
    needs_x, _, *needs = ctx.needs_input_grad
    dX: Any = None
    grads: list[Tensor | None] = [None] * len(tensors)
    dS, dT, downs, large, trained = [], [], [], [], []
    column = 0
    for i, (dY, scaling) in enumerate(zip(dYs, ctx.scalings, strict=True)):
        weight, _, A, B, A0, B0 = tensors[_EACH * i : _EACH * (i + 1)]
        needs_weight, needs_bias, needs_A, needs_B = needs[_EACH * i : _EACH * i + 4]
        width = len(A) if A0 is None else 2 * len(A)
        part = S[:, column : column + width] if needs_B else None
        column += width
        if dY is None:  # nobody used this output
            continue
        dy = flat(dY).contiguous()
        dSi, dB = through_up(dy, up(B, B0, dy.dtype), part, scaling, B, needs_x or needs_A)
        grads[_EACH * i + 3] = dB
        if needs_A:
            dT.append(dSi if A0 is None else dSi[:, : len(A)] + dSi[:, len(A) :])
            trained.append(i)
        if needs_x:
            dS.append(dSi)
            downs.append(down(A, A0, dy.dtype))
            large.append((dy, weight))
        if needs_weight:
            grads[_EACH * i] = dy.t() @ flat(x)
        if needs_bias:
            grads[_EACH * i + 1] = dy.sum(0)
    if trained:
        product, row = torch.cat(dT, 1).t() @ flat(x), 0
        for i in trained:
            A = tensors[_EACH * i + 2]
            grads[_EACH * i + 2] = product[row : row + len(A)].to(A.dtype)
            row += len(A)
    if dS:
        dX = torch.cat(dS, 1) @ torch.cat(downs)
        for dy, weight in large:
            accumulate(dX, dy, weight)
        dX = dX.view(ctx.shape)
    return dX, None, *grads


class SharedProduct(torch.autograd.Function):
    """``yᵢ = x·Wᵢᵀ + biasᵢ + scalingᵢ · x·Aᵢᵀ·Bᵢᵀ`` for all members; order and memory as in `single`."""

    backward = staticmethod(differentiable_once(_gradients))

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: list[float], *tensors: Any) -> tuple[Tensor, ...]:
        members = [tensors[i : i + _EACH] for i in range(0, len(tensors), _EACH)]
        S = flat(x) @ torch.cat([down(A, A0, x.dtype) for _, _, A, _, A0, _ in members]).t()
        outputs, column = [], 0
        for scaling, (weight, bias, _, B, _, B0) in zip(scalings, members, strict=True):
            right = up(B, B0, x.dtype)
            y = F.linear(x, weight, bias).contiguous()
            accumulate(flat(y), S[:, column : column + right.shape[1]], right.t(), scaling)
            column += right.shape[1]
            outputs.append(owned(y))
        needs_x, _, *needs = ctx.needs_input_grad
        needs_right = any(needs[::_EACH]) or any(needs[2::_EACH])
        ctx.scalings, ctx.shape = scalings, x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if needs_right else None,
            S if any(needs[3::_EACH]) else None,
            *(None if not needs_x and i % _EACH == 0 else t for i, t in enumerate(tensors)),
        )
        return tuple(outputs)
