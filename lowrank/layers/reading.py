"""The weight of an adapted layer as other code reads it: W + ΔW, computed when an operation uses it.

Many modules use a child's weight and never call the child: ``F.linear(x, self.qkv.weight, bias)``. Others
only ask a weight for its dtype. `ReadWeight` serves both. The layer's own forward does not use it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lowrank.layers.bases import fake
from lowrank.layers.functional import Block, transformed
from lowrank.layers.gemm import differentiable_once
from lowrank.layers.weight import effective_weight
from lowrank.linalg.rows import Rows, take


class Layout(NamedTuple):
    """How a matrix ``(out, in)`` is stored: ``rows(…)`` is the matrix, and ``stored(…, shape)`` undoes it."""

    rows: Callable[[Tensor], Tensor]
    stored: Callable[[Tensor, torch.Size], Tensor]


AS_STORED = Layout(lambda stored: stored, lambda rows, shape: rows)
TRANSPOSED = Layout(torch.t, lambda rows, shape: rows.t())
FLATTENED = Layout(lambda stored: stored.flatten(1), lambda rows, shape: rows.view(shape))  # a kernel's axes


def read_weight(
    weight: Tensor, blocks: Sequence[Block], *, layout: Layout, used: Callable[[], None]
) -> Tensor:
    """W + ΔW in W's shape and dtype, differentiable once in the factors and in W.

    In compiled and exported code, and under `torch.func`, it is computed at once, from ordinary operations.

    Args:
        weight: the matrix ``(out, in)``, stored as `layout` says.
        used: called when the values are asked for.
    """

    def compute() -> Tensor:
        used()
        return layout.stored(effective_weight(layout.rows(weight), blocks), weight.shape)

    if torch.compiler.is_compiling() or transformed() or fake(weight):
        return compute()
    spans = [(block.rows, block.scaling) for block in blocks]
    factors = (factor for _, A, B, _, A0, B0 in blocks for factor in (A, B, A0, B0))
    return _Read.apply(compute, spans, layout, weight, *factors)


def readable(weight: Any) -> bool:
    """Can ΔW be added to ``weight``? Not where it is packed, sharded, or in 8 bits."""
    return (
        (type(weight) in (nn.Parameter, Tensor) or fake(weight))
        and weight.is_floating_point()
        and weight.itemsize > 1
    )


def in_forward() -> bool:
    """Does a module's call run now? Else it is a user's own code that asks."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


class ReadWeight(Tensor):
    """Has a weight's shape, dtype, device and gradient; its values are computed once, when they are used.

    It acts below autograd, so that every operation of PyTorch's sees W + ΔW, those called from C++ too. It
    cannot be written to: what it shows is not stored anywhere.
    """

    _compute: Callable[[], Tensor]
    _known: list[Tensor]

    @staticmethod
    def __new__(cls, like: Tensor, compute: Callable[[], Tensor], values: list[Tensor]) -> ReadWeight:
        made = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        made._compute, made._known = compute, values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:  # it still cannot be written to
            return cls(args[0], args[0]._compute, args[0]._known)
        kwargs = kwargs or {}
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.is_write and isinstance(named.get(argument.name), cls):
                raise RuntimeError(
                    f"{func} would write into the weight of an adapted layer, which reads as W + ΔW and is "
                    "computed and not stored: write to layer.base.weight"
                )
        args, kwargs = tree_map_only(cls, cls.values, (args, kwargs))
        return func(*args, **kwargs)

    @torch.no_grad()
    def values(self) -> Tensor:
        """W + ΔW as an ordinary tensor without a gradient."""
        if not self._known:
            self._known.append(self._compute())
        return self._known[0]

    # What hands out memory is not an operation, and does not come through __torch_dispatch__.

    def data_ptr(self) -> int:
        return self.values().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values().untyped_storage()

    def tolist(self) -> Any:
        return self.values().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        return self.values().numpy(force=force)

    def __dlpack__(self, **options: Any) -> Any:
        return self.values().__dlpack__(**options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if self.requires_grad:
            raise RuntimeError(
                "W + ΔW is computed from the adapters: copy the layer, or layer.weight.detach()"
            )
        return self.values().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().detach().__reduce_ex__(protocol)


def _gradients(ctx: Any, dW: Tensor) -> tuple[Tensor | None, ...]:
    """Of ΔW = s·(B·(A0 + A) + B0·A), in fp32: dA = s·(B + B0)ᵀ·dW, dB = s·dW·(A0 + A)ᵀ."""
    factors = ctx.saved_tensors
    needs_weight, *needs = ctx.needs_input_grad[3:]
    whole = ctx.layout.rows(dW)
    grads: list[Tensor | None] = [None] * len(factors)
    for i, (rows, scaling) in enumerate(ctx.spans):
        A, B, A0, B0 = factors[4 * i : 4 * i + 4]
        part = take(whole, rows).to(torch.promote_types(torch.float32, A.dtype))
        left, right = (B, A) if A0 is None else (B + B0, A0 + A)
        if needs[4 * i]:
            grads[4 * i] = (scaling * left.to(part.dtype).t() @ part).to(A.dtype)
        if needs[4 * i + 1]:
            grads[4 * i + 1] = (scaling * part @ right.to(part.dtype).t()).to(B.dtype)
    return None, None, None, dW if needs_weight else None, *grads


class _Read(torch.autograd.Function):
    """Puts a `ReadWeight` into the graph, above the weight and the factors that it is computed from."""

    backward = staticmethod(differentiable_once(_gradients))

    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[[], Tensor],
        spans: list[tuple[Rows, float]],
        layout: Layout,
        weight: Tensor,
        *factors: Any,
    ) -> Tensor:
        ctx.spans, ctx.layout = spans, layout
        ctx.save_for_backward(*factors)
        return ReadWeight(weight, compute, [])
