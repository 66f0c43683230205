"""Products of rows that are sorted into groups, each group with a matrix of its own.

PyTorch's grouped product where the base uses it too, else a loop. Rows past the last group are undefined.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.linalg.shapes_only import shapes_only

_native: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def grouped(a: Tensor, b: Tensor, offs: Tensor, native: bool) -> Tensor:
    """``a[g]·b[g]``: a (rows, k), b (groups, k, n), offs (groups,) where each group ends."""
    if native:
        return _native(_fitting(a), b, offs=offs)
    made = a.new_zeros(a.shape[0], b.shape[2])
    for g, rows in _groups(offs):
        torch.mm(a[rows], b[g], out=made[rows])
    return made


def outer(a: Tensor, b: Tensor, offs: Tensor, native: bool) -> Tensor:
    """``a[g]ᵀ·b[g]`` as (groups, m, n): a (rows, m), b (rows, n)."""
    if native:
        return _native(_fitting(a).t(), _fitting(b), offs=offs)
    made = a.new_zeros(len(offs), a.shape[1], b.shape[1])
    for g, rows in _groups(offs):
        torch.mm(a[rows].t(), b[rows], out=made[g])
    return made


def _groups(offs: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    if shapes_only(offs):  # a loop over products that are written into what is there
        return
    for g, stop in enumerate(offs.tolist()):
        if stop > start:
            yield g, slice(start, stop)
        start = stop


def _fitting(a: Tensor) -> Tensor:
    """``a`` with rows that begin at multiples of 16 bytes, as the kernels want."""
    lies = a.stride(1) == 1 and (a.stride(0) * a.itemsize) % 16 == 0
    lies = lies and (shapes_only(a) or a.data_ptr() % 16 == 0)
    return a if lies else a.contiguous()
