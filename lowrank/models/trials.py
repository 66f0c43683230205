"""Finds out what a module computes by running a copy of it on a few numbers.

For code that names and shapes do not tell: does a layer multiply by its weight, or by its transpose, and
which rows of a fused weight are the query's? The module itself is never run, and nothing of it changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lowrank.models.copies import NoCopyError, copied, is_plain
from lowrank.models.unnoticed import unnoticed


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

    Layers with Linear's own forward are not tried, nor are those on the meta device, packed or distributed,
    nor those of which there is no copy.
    """
    kind = type(module)
    known = kind.forward is nn.Linear.forward or kind.__module__ == "transformers.pytorch_utils"
    if known or is_parametrized(module, "weight"):  # whose weight is computed when it is read
        return LayerTrial()
    weight: Any = getattr(module, "weight", None)
    if not is_plain(weight):
        return LayerTrial()
    return once(module, ("layer", rows, columns), lambda: _try_layer(module, weight, rows, columns))


# -- layers -------------------------------------------------------------------------------------------


def _try_layer(module: nn.Module, weight: Tensor, rows: int, columns: int) -> LayerTrial:
    problem = ""
    for shape in ((1, 2, columns), (2, columns)):
        x = torch.arange(2.0 * columns, device=weight.device).cos().view(shape).to(weight.dtype)
        with unnoticed(weight.device):
            try:
                copy = copied(module, torch.clone, weight.device)
                y: Any = type(module).forward(copy, x)
            except NoCopyError:
                return LayerTrial()
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


# -- one for many -------------------------------------------------------------------------------------------

_RESULTS: WeakKeyDictionary[type, dict[Any, Any]] = WeakKeyDictionary()


def once(module: nn.Module, key: tuple[Any, ...], attempt: Callable[[], Any]) -> Any:
    """One trial for all modules of a class that have the same settings, dtype and device."""
    settings = tuple(
        (name, ref(value) if isinstance(value, FunctionType) else value)  # which may hold a model
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
