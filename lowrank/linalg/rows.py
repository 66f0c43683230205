"""Some rows of a matrix: one block, or pieces of one size at equal distances, as attention heads lie.

The one place that says what the numbers mean. It knows neither adapters nor models.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Rows = tuple[int, ...]
"""``(start, stop)``, or ``(start, stop, size, stride)``: of the rows from start to stop, the first
``size`` of every ``stride``."""


def repeating(start: int, size: int, stride: int, count: int) -> Rows:
    """``count`` pieces of ``size`` rows, one every ``stride`` rows from ``start`` on."""
    stop = start + (count - 1) * stride + size
    return (start, stop) if count == 1 or size == stride else (start, stop, size, stride)


def height(rows: Rows) -> int:
    """How many rows these are."""
    start, stop, *repeated = rows
    if not repeated:
        return stop - start
    size, stride = repeated
    return size * ((stop - start - size) // stride + 1)


def lie_within(rows: Rows, limit: int) -> bool:
    """Are these rows, at least one, of a matrix that has ``limit`` of them?"""
    start, stop, *repeated = rows
    if not 0 <= start < stop <= limit:
        return False
    if not repeated:
        return True
    size, stride = repeated
    return 0 < size < stride <= stop - start - size and (stop - start - size) % stride == 0


def pieces(rows: Rows) -> list[tuple[int, int]]:
    """The blocks ``(start, stop)`` that these rows consist of, in order."""
    start, stop, *repeated = rows
    if not repeated:
        return [(start, stop)]
    size, stride = repeated
    return [(first, first + size) for first in range(start, stop, stride)]


def shifted(rows: Rows, by: int) -> Rows:
    """The same rows, counted from another one."""
    return (rows[0] + by, rows[1] + by, *rows[2:])


def view(matrix: Tensor, rows: Rows, dim: int = 0) -> Tensor:
    """The rows of ``matrix``, counted along ``dim``, without a copy.

    A block keeps its dimension, ``(…, rows, …)``; other rows have two instead, ``(…, pieces, size, …)``.
    """
    start, stop, *repeated = rows
    whole = matrix.narrow(dim, start, stop - start)
    return whole.unfold(dim, *repeated).movedim(-1, dim + 1) if repeated else whole


def take(matrix: Tensor, rows: Rows, dim: int = 0) -> Tensor:
    """The rows of ``matrix``, counted along ``dim``, side by side: of a block a view, else a copy."""
    seen = view(matrix, rows, dim)
    return seen.flatten(dim, dim + 1) if len(rows) > 2 else seen


def add_(matrix: Tensor, rows: Rows, update: Tensor) -> None:
    """``matrix[rows] += update``, in place; ``update`` is ``(rows, …)``."""
    seen = view(matrix, rows)
    seen.add_(update.reshape(seen.shape))


def copy_(matrix: Tensor, rows: Rows, values: Tensor) -> None:
    """``matrix[rows] = values``, in place; ``values`` is ``(rows, …)``."""
    seen = view(matrix, rows)
    seen.copy_(values.reshape(seen.shape))


def spread(columns: Tensor, rows: Rows, width: int) -> Tensor:
    """``(…, rows)`` as ``(…, width)``, zero elsewhere: differentiable, and made of ordinary operations."""
    start, stop, *repeated = rows
    if repeated:
        size, stride = repeated
        apart = rearrange(columns, "... (pieces size) -> ... pieces size", size=size)
        apart = F.pad(apart, (0, stride - size))
        columns = rearrange(apart, "... pieces stride -> ... (pieces stride)")[..., : stop - start]
    return F.pad(columns, (start, width - stop))
