"""Finds out what a module computes by running a copy of it on a few numbers.

For code that names and shapes do not tell: does a layer multiply by its weight, or by its transpose, and
which rows of a fused weight are the query's? The module itself is never run, and nothing of it changes.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

TOKENS = 6
SAME, LINEAR, MOVED = 1e-6, 1e-4, 1e-3  # relative, in fp64


@dataclass(frozen=True)
class LayerTrial:
    """What calling a layer gave.

    Args:
        problem: what its forward does, where no update can be added to that; else empty.
        transposed: it multiplies by its weight as ``(in, out)``; None where that was not tried.
    """

    problem: str = ""
    transposed: bool | None = None


def try_layer(module: nn.Module, rows: int, columns: int) -> LayerTrial:
    """Does ``module`` map ``(..., columns)`` to ``(..., rows)``, and which way does it read its weight?

    Layers with Linear's own forward are not tried, nor are those on the meta device, packed or distributed.
    """
    weight: Any = getattr(module, "weight", None)
    kind = type(module)
    known = kind.forward is nn.Linear.forward or kind.__module__ == "transformers.pytorch_utils"
    if known or not is_plain(weight):
        return LayerTrial()
    return once(module, ("layer", rows, columns), lambda: _try_layer(module, weight, rows, columns))


# -- layers -------------------------------------------------------------------------------------------


def _try_layer(module: nn.Module, weight: Tensor, rows: int, columns: int) -> LayerTrial:
    problem = ""
    for shape in ((1, 2, columns), (2, columns)):
        x = torch.arange(2.0 * columns, device=weight.device).cos().view(shape).to(weight.dtype)
        with unnoticed(weight.device):
            copy = copied(module, torch.clone)
            try:
                y: Any = type(module).forward(copy, x)
            except Exception as error:  # whatever a stranger's code raises
                what = f"{type(error).__name__}: {error}"
                problem = problem or f"fails on an input of {shape} ({what})"
                continue
        if not isinstance(y, Tensor):
            return LayerTrial(f"returns a {type(y).__name__} and not a tensor")
        if tuple(y.shape) == (*shape[:-1], rows):
            return LayerTrial(transposed=_reads_transposed(copy, x, y))
        problem = f"gives {tuple(y.shape)} for an input of {shape}, not {(*shape[:-1], rows)}"
    return LayerTrial(problem)


def _reads_transposed(copy: nn.Module, x: Tensor, y: Tensor) -> bool:
    weight, bias = cast("Tensor", copy.weight).detach(), getattr(copy, "bias", None)
    shifts = [torch.zeros_like(y)]
    if isinstance(bias, Tensor) and bias.shape == y.shape[-1:]:
        shifts.append(bias.detach().to(y.dtype).expand_as(y))

    def miss(matrix: Tensor) -> float:
        if matrix.shape[0] != x.shape[-1]:
            return float("inf")
        return min(float((y - shift - x @ matrix).norm() / y.norm().clamp_min(1e-30)) for shift in shifts)

    as_rows, as_columns = miss(weight.T), miss(weight)
    return as_columns < as_rows and as_columns <= 0.05


# -- copies -------------------------------------------------------------------------------------------

_RESULTS: WeakKeyDictionary[type, dict[Any, Any]] = WeakKeyDictionary()


def once(module: nn.Module, key: tuple[Any, ...], attempt: Callable[[], Any]) -> Any:
    """One trial for all modules of a class that have the same settings, dtype and device."""
    settings = tuple(
        (name, value)
        for name, value in vars(module).items()
        if (isinstance(value, bool | int | float | str) and "layer" not in name)
        or isinstance(value, FunctionType)
    )
    kinds = tuple((p.dtype, p.device.type) for p in [*module.parameters(), *module.buffers()][:8])
    known = _RESULTS.setdefault(type(module), {})
    key = (*key, settings, kinds)
    if key not in known:
        known[key] = attempt()
    return known[key]


def is_plain(tensor: object) -> bool:
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and not tensor.is_meta  # type: ignore[attr-defined]
        and tensor.is_floating_point()  # type: ignore[attr-defined]
        and tensor.element_size() > 1  # type: ignore[attr-defined]
    )


def copied(module: nn.Module, new: Callable[[Tensor], Tensor]) -> Any:
    """``module`` without its hooks, in evaluation mode, with tensors of its own."""
    copy = module.__class__.__new__(module.__class__)
    for name, value in module.__dict__.items():  # what a forward may write into becomes the copy's own
        copy.__dict__[name] = value.copy() if type(value) in (dict, list, set) else value
    copy.__dict__.pop("forward", None)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        copy.__dict__[name] = OrderedDict()
    copy.__dict__["training"] = False
    copy.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter(new(p), requires_grad=False)
        for name, p in module._parameters.items()
    }
    copy.__dict__["_buffers"] = {
        name: None if b is None else new(b.detach()) for name, b in module._buffers.items()
    }
    copy.__dict__["_modules"] = {
        name: None if child is None else copied(child, new) for name, child in module._modules.items()
    }
    return copy


@contextmanager
def unnoticed(device: torch.device) -> Iterator[None]:
    """No gradient, no warning, and the random numbers that come next stay what they would be."""
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
