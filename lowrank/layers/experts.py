"""Adapts the products with a tensor of experts, so that their cost and memory follow the tokens.

A module that multiplies by its experts' tensors finds an `ExpertWeight` in their place, which knows the usual
ways to use one: a product with one expert's slice, grouped products, batched ones. There the base's own call
comes first, and the update of the tokens that it has is added. Whatever else is done with it meets W + ΔW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lowrank.layers.expert_stack import ExpertStacks, Layout, padded
from lowrank.layers.functional import Block, fused_lora, transformed
from lowrank.layers.gemm import differentiable_once
from lowrank.layers.grouped_mm import grouped, outer
from lowrank.linalg.rows import Rows, spread, take, view

Part = tuple[ExpertStacks, Tensor | None]  # what acts on a tensor, and the factor of its ΔW


def adapted_experts(weight: Tensor, parts: Sequence[Part]) -> Tensor:
    """``weight`` for whatever multiplies by it; in compiled code and under `torch.func` W + ΔW in full."""
    low = LowRank(weight, parts)
    if torch.compiler.is_compiling() or transformed():
        return low.whole()
    return ExpertWeight.show(weight, low, low.layout.transposed, None)


class LowRank:
    """What acts on one tensor of experts, in the forms that products take, each made once a forward."""

    def __init__(self, weight: Tensor, parts: Sequence[Part]) -> None:
        self.weight, self.parts = weight, parts
        self.layout: Layout = parts[0][0].layout
        self._blocks: list[list[Block]] | None = None
        self._pairs: dict[torch.dtype, list[tuple[Rows, Tensor, Tensor, float]]] = {}
        self._whole: Tensor | None = None

    def blocks(self, expert: int) -> list[Block]:
        if self._blocks is None:
            stacks = [stack.blocks(factor) for part, factor in self.parts for stack in part.stacks()]
            self._blocks = [
                [block for block in each if block is not None] for each in zip(*stacks, strict=True)
            ]
        return self._blocks[expert]

    def pairs(self, dtype: torch.dtype) -> list[tuple[Rows, Tensor, Tensor, float]]:
        """Rows within an expert, A ``(experts, R, in)``, B ``(experts, rows, R)`` and the scaling."""
        if dtype not in self._pairs:
            self._pairs[dtype] = [
                (stack.rows, *stack.pair(factor, dtype))
                for part, factor in self.parts
                for stack in part.stacks()
            ]
        return self._pairs[dtype]

    def whole(self) -> Tensor:
        """W + ΔW as it is stored."""
        if self._whole is None:
            weight = self.weight.mT if self.layout.transposed else self.weight
            made = weight
            for part, factor in self.parts:
                made = part.add_to(made, factor)
            made = made.to(weight.dtype)
            self._whole = made.mT if self.layout.transposed else made
        return self._whole

    def one(self, x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
        """``F.linear(x, weight, bias)`` of one expert's tokens, weight ``(out, in)``."""
        blocks = self.blocks(expert)
        return fused_lora(x, weight, bias, blocks) if blocks else F.linear(x, weight, bias)

    def batch(self, y: Tensor, x: Tensor, pick: Tensor | None) -> Tensor:
        """``y`` (n, tokens, out) plus the updates of x (n, tokens, in): of expert i, or of ``pick[i]``."""
        for rows, A, B, scaling in self.pairs(y.dtype):
            if pick is not None:
                A, B = A[pick], B[pick]
            update = scaling * torch.bmm(torch.bmm(x.to(y.dtype), A.mT), B.mT)
            y = y + spread(update, rows, y.shape[-1])
        return y

    def group(self, y: Tensor, x: Tensor, offs: Tensor, native: bool) -> Tensor:
        """``y`` (tokens, out), written to, plus the updates of x (tokens, in), sorted by expert."""
        spans: list[tuple[Rows, float]] = []
        factors: list[Tensor] = []
        for rows, A, B, scaling in self.pairs(y.dtype):
            spans.append((rows, scaling))
            factors += padded(A, B)
        return _GroupedUpdate.apply(y, x.to(y.dtype), offs, native, spans, *factors)


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


class ExpertWeight(Tensor):
    """A tensor of experts, or what is picked of it, that knows its update.

    ``_flip``: the last two dimensions are (in, out) and not (out, in). ``_pick``: one expert, or ``(n,)``
    experts, or None for all.
    """

    _low: LowRank
    _flip: bool
    _pick: int | Tensor | None

    @staticmethod
    def show(plain: Tensor, low: LowRank, flip: bool, pick: int | Tensor | None) -> ExpertWeight:
        with torch._C.DisableTorchFunctionSubclass():
            shown = plain.as_subclass(ExpertWeight)
        shown._low, shown._flip, shown._pick = low, flip, pick
        return shown

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            name = _NAMES.get(func) or str(func)
            if name in _PRODUCTS:
                made = _PRODUCTS[name](func, *args, **kwargs)
                if made is not NotImplemented:
                    return made
            elif func in _METADATA or getattr(func, "__name__", "") == "__get__":
                return func(*args, **kwargs)
            args, kwargs = tree_map_only(ExpertWeight, ExpertWeight.values, (args, kwargs))
            return func(*args, **kwargs)

    def values(self) -> Tensor:
        """W + ΔW of what is picked, an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            whole = self._low.whole()
            picked = whole if self._pick is None else whole[self._pick]
            return picked.mT if self._flip != self._low.layout.transposed else picked

    def plain(self) -> Tensor:
        """The base's numbers."""
        return self.as_subclass(Tensor)

    def flipped(self) -> ExpertWeight:
        return ExpertWeight.show(self.plain().mT, self._low, not self._flip, self._pick)


# -- the ways to use it; called where torch functions see plain tensors ------------------------------------


def _get(func: Any, w: Any, key: Any) -> Any:
    if not isinstance(w, ExpertWeight) or w._pick is not None:
        return NotImplemented
    if isinstance(key, int) and not isinstance(key, bool):
        expert = key
    elif isinstance(key, Tensor) and key.dtype in (torch.int64, torch.int32) and key.dim() < 2:
        if key.dim() == 1:
            return ExpertWeight.show(w.plain()[key], w._low, w._flip, key)
        expert = int(key)
    else:
        return NotImplemented
    return ExpertWeight.show(w.plain()[expert], w._low, w._flip, expert % w._low.layout.experts)


def _flip(func: Any, w: ExpertWeight, *dims: int, dim0: int = -2, dim1: int = -1) -> Any:
    first, second = dims or (dim0, dim1)
    if {first % w.dim(), second % w.dim()} != {w.dim() - 2, w.dim() - 1}:
        return NotImplemented
    return w.flipped()


def _mT(func: Any, w: ExpertWeight) -> Any:
    return w.flipped()


def _T(func: Any, w: ExpertWeight) -> Any:
    return w.flipped() if w.dim() == 2 else NotImplemented


def _linear(func: Any, x: Any, w: Any, bias: Any = None) -> Any:
    if (
        isinstance(x, ExpertWeight)
        or not isinstance(w, ExpertWeight)
        or w._flip
        or not isinstance(w._pick, int)
    ):
        return NotImplemented
    return w._low.one(x, w.plain(), bias, w._pick)


def _matmul(func: Any, a: Any, b: Any) -> Any:
    if (
        isinstance(b, ExpertWeight)
        and not isinstance(a, ExpertWeight)
        and b._flip
        and isinstance(b._pick, int)
    ):
        return b._low.one(a, b.plain().T, None, b._pick)
    return _bmm(func, a, b) if a.dim() == b.dim() == 3 else NotImplemented


def _bmm(func: Any, a: Any, b: Any) -> Any:
    if isinstance(b, ExpertWeight) and not isinstance(a, ExpertWeight) and b._flip:
        return b._low.batch(func(a, b.plain()), a, _index(b))
    if isinstance(a, ExpertWeight) and not isinstance(b, ExpertWeight) and not a._flip:
        return a._low.batch(func(a.plain(), b).mT, b.mT, _index(a)).mT
    return NotImplemented


def _index(w: ExpertWeight) -> Tensor | None:
    assert not isinstance(w._pick, int)
    return w._pick


def _grouped(func: Any, x: Any, w: Any, offs: Any = None, **options: Any) -> Any:
    usable = isinstance(w, ExpertWeight) and not isinstance(x, ExpertWeight) and w._flip and w._pick is None
    if not usable or offs is None or x.dim() != 2 or any(each is not None for each in options.values()):
        return NotImplemented
    native = "fallback" not in str(func)
    return w._low.group(func(x, w.plain(), offs=offs), x, offs, native)


_PRODUCTS: dict[str, Callable[..., Any]] = {
    "getitem": _get,
    "flip": _flip,
    "mT": _mT,
    "T": _T,
    "linear": _linear,
    "matmul": _matmul,
    "bmm": _bmm,
    "grouped": _grouped,
    "transformers.grouped_mm_fallback": _grouped,
    "transformers.grouped_mm_fallback.default": _grouped,
}
_NAMES: dict[Any, str] = {
    Tensor.__getitem__: "getitem",
    **dict.fromkeys((Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes), "flip"),
    Tensor.mT.__get__: "mT",  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.T.__get__, Tensor.t, torch.t), "T"),  # type: ignore[attr-defined]
    F.linear: "linear",
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm), "matmul"
    ),
    **dict.fromkeys((torch.bmm, Tensor.bmm), "bmm"),
    **{
        getattr(owner, name): "grouped"
        for owner, name in ((F, "grouped_mm"), (torch, "_grouped_mm"))
        if hasattr(owner, name)
    },
}
del _NAMES[Tensor.__rmatmul__]  # its arguments come the other way round
_METADATA = frozenset(
    getattr(Tensor, name)
    for name in "dim size stride numel nelement element_size is_floating_point is_complex is_contiguous "
    "data_ptr storage_offset get_device __len__ is_inference _is_view".split()
)
