"""A tensor of matrices, as experts are stored, that hands the products with it to whoever watches them.

It knows the usual ways to multiply by one. Whatever else is done with it meets its values in full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lowrank.linalg.shapes_only import shapes_only


class Products(Protocol):
    """What is made of the products with a tensor ``(experts, out, in)``, or ``(experts, in, out)``."""

    experts: int
    transposed: bool

    def whole(self) -> Tensor:
        """The values of the tensor, in three dimensions, for whatever is no product."""

    def one(self, x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
        """``F.linear(x, weight, bias)`` of one expert's tokens, weight ``(out, in)``."""

    def batch(self, y: Tensor, x: Tensor, pick: Tensor | None) -> Tensor:
        """``y`` (n, tokens, out), made of x (n, tokens, in): by expert i, or by ``pick[i]``."""

    def group(self, y: Tensor, x: Tensor, offs: Tensor, multiply: Callable[..., Tensor]) -> Tensor:
        """``y`` (tokens, out), which may be written to, made of x (tokens, in), sorted by expert.

        ``multiply(a, b, offs=offs)`` is the grouped product that made it.
        """


class StackedWeight(Tensor):
    """A tensor of experts, or what is picked of it, that knows who sees its products.

    ``_flip``: the last two dimensions are (in, out) and not (out, in). ``_pick``: one expert, or ``(n,)``
    experts, or None for all.
    """

    _plain: Tensor
    _low: Products
    _flip: bool
    _pick: int | Tensor | None

    @staticmethod
    def show(plain: Tensor, low: Products, flip: bool, pick: int | Tensor | None) -> StackedWeight:
        with torch._C.DisableTorchFunctionSubclass():
            shown = _around(plain) if shapes_only(plain) else plain.as_subclass(StackedWeight)
        shown._plain, shown._low, shown._flip, shown._pick = plain, low, flip, pick
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
            args, kwargs = tree_map_only(StackedWeight, StackedWeight.values, (args, kwargs))
            return func(*args, **kwargs)

    def values(self) -> Tensor:
        """The values of what is picked, an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            whole = self._low.whole()
            picked = whole if self._pick is None else whole[self._pick]
            picked = picked.mT if self._flip != self._low.transposed else picked
            return picked.reshape(self.shape).to(self.dtype)

    def plain(self) -> Tensor:
        """What is stored, whatever `Products.whole` says. It is kept: compilers know no way back."""
        return self._plain

    def flipped(self) -> StackedWeight:
        # `.mT` is an attribute, which a compiler does not take for a tensor of its own.
        return StackedWeight.show(self.plain().transpose(-2, -1), self._low, not self._flip, self._pick)


class _Around(StackedWeight):
    """One around a tensor without numbers, which is an object of its own and has no other class."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(StackedWeight, StackedWeight.values, (args, kwargs or {}))
        return func(*args, **kwargs)


def _around(plain: Tensor) -> _Around:
    made: _Around = Tensor._make_wrapper_subclass(
        _Around, plain.size(), strides=plain.stride(), dtype=plain.dtype, device=plain.device
    )
    return made


# -- the ways to use it; called where torch functions see plain tensors ------------------------------------


def _flat(w: Any) -> bool:
    """Is it all experts, in two dimensions? Nothing but `_view` knows that."""
    return isinstance(w, StackedWeight) and w._pick is None and w.dim() == 2


def _view(func: Any, w: Any, *shape: Any) -> Any:
    """A dimension for the experts, where they are stored in two."""
    if not _flat(w):
        return NotImplemented
    seen = func(w.plain(), *shape)
    apart = seen.dim() == 3 and seen.shape[0] == w._low.experts and seen.shape[2] == w.shape[1]
    return StackedWeight.show(seen, w._low, w._flip, None) if apart else NotImplemented


def _get(func: Any, w: Any, key: Any) -> Any:
    if not isinstance(w, StackedWeight) or w._pick is not None or w.dim() != 3:
        return NotImplemented
    if isinstance(key, int) and not isinstance(key, bool):
        expert = key
    elif isinstance(key, Tensor) and key.dtype in (torch.int64, torch.int32) and key.dim() < 2:
        if key.dim() == 1:
            return StackedWeight.show(w.plain()[key], w._low, w._flip, key)
        expert = int(key)
    else:
        return NotImplemented
    return StackedWeight.show(w.plain()[expert], w._low, w._flip, expert % w._low.experts)


def _flip(func: Any, w: StackedWeight, *dims: int, dim0: int = -2, dim1: int = -1) -> Any:
    first, second = dims or (dim0, dim1)
    if _flat(w) or {first % w.dim(), second % w.dim()} != {w.dim() - 2, w.dim() - 1}:
        return NotImplemented
    return w.flipped()


def _mT(func: Any, w: StackedWeight) -> Any:
    return NotImplemented if _flat(w) else w.flipped()


def _T(func: Any, w: StackedWeight) -> Any:
    return w.flipped() if w.dim() == 2 and not _flat(w) else NotImplemented


def _cast(func: Any, w: StackedWeight, *args: Any, **kwargs: Any) -> Any:
    """The same experts in another precision, as some multiply by them."""
    plain = func(w.plain(), *args, **kwargs)
    moved = plain.device != w.device or plain.shape != w.shape or not plain.is_floating_point()
    return NotImplemented if moved else StackedWeight.show(plain, w._low, w._flip, w._pick)


def _linear(func: Any, x: Any, w: Any, bias: Any = None) -> Any:
    if (
        isinstance(x, StackedWeight)
        or not isinstance(w, StackedWeight)
        or w._flip
        or not isinstance(w._pick, int)
    ):
        return NotImplemented
    return w._low.one(x, w.plain(), bias, w._pick)


def _matmul(func: Any, a: Any, b: Any) -> Any:
    if (
        isinstance(b, StackedWeight)
        and not isinstance(a, StackedWeight)
        and b._flip
        and isinstance(b._pick, int)
    ):
        return b._low.one(a, b.plain().T, None, b._pick)
    return _bmm(func, a, b) if a.dim() == b.dim() == 3 else NotImplemented


def _bmm(func: Any, a: Any, b: Any) -> Any:
    if isinstance(b, StackedWeight) and not isinstance(a, StackedWeight) and b._flip:
        return b._low.batch(func(a, b.plain()), a, _index(b))
    if isinstance(a, StackedWeight) and not isinstance(b, StackedWeight) and not a._flip:
        return a._low.batch(func(a.plain(), b).mT, b.mT, _index(a)).mT
    return NotImplemented


def _index(w: StackedWeight) -> Tensor | None:
    assert not isinstance(w._pick, int)
    return w._pick


def _grouped(func: Any, x: Any, w: Any, offs: Any = None, **options: Any) -> Any:
    usable = isinstance(w, StackedWeight) and not isinstance(x, StackedWeight) and w._flip and w._pick is None
    if not usable or offs is None or x.dim() != 2 or any(each is not None for each in options.values()):
        return NotImplemented
    return w._low.group(func(x, w.plain(), offs=offs), x, offs, func)


_PRODUCTS: dict[str, Callable[..., Any]] = {
    "getitem": _get,
    "view": _view,
    "flip": _flip,
    "mT": _mT,
    "cast": _cast,
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
    **dict.fromkeys((Tensor.view, Tensor.reshape), "view"),
    **dict.fromkeys((Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes), "flip"),
    Tensor.mT.__get__: "mT",  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.T.__get__, Tensor.t, torch.t), "T"),  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16), "cast"),
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
