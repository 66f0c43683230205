"""How exact products and sums are, whatever the program around has set; and Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import RLock
from typing import Any

import torch
from torch import Tensor

_SWITCHES = RLock()  # they are the process's, and a backward pass may have a thread for each device
STRIPE = 256  # rows that are mirrored at a time
SMALL = 512  # rows of a matrix whose eigenvectors are found in fp64 on CUDA
BLOCKS, NARROW = 6, 256  # of a Gram matrix's rows: 7/12 of it is computed; below the width, all at once


def autocasts(x: Tensor) -> bool:
    """Is autocast on for what is computed with ``x``? PyTorch cannot be asked that on the meta device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """For what is computed with ``x``, on whatever device it is."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products are what their dtype says: no TF32 or bf16 inside them, no autocast, no graph."""
    with _products(device, "highest"):
        yield


@contextmanager
def fast_precision(device: torch.device) -> Iterator[None]:
    """The factors of an fp32 product may be rounded to TF32 (CUDA) or bf16 (CPU) where hardware gains by it.

    Sums stay fp32. A factor is off by 2⁻⁹ at most: little beside a sum, unless what it sums nearly cancels.
    No autocast and no graph, as in `full_precision`.
    """
    with _products(device, "medium"):
        yield


@contextmanager
def _products(device: torch.device, level: str) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_SWITCHES)
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_level(level))
        yield


@contextmanager
def _level(level: str) -> Iterator[None]:
    """`torch.set_float32_matmul_precision`, undone afterwards, whichever switches the program has used.

    Torch has an older switch and, from 2.9 on, one for each backend. Where they contradict each other it
    neither multiplies on CUDA nor says what the older one is. Setting the older one sets all of them alike.
    """
    found = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    switches: list[Any] = [each for each in found if hasattr(each, "fp32_precision")]
    before = [each.fp32_precision for each in switches]
    for each in switches:
        each.fp32_precision = "ieee"  # contradicts no value of the older one, which can be read now
    older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for each, precision in zip(switches, before, strict=True):
            each.fp32_precision = "none"  # it then takes what is set for all backends
            if each.fp32_precision != precision:
                each.fp32_precision = precision


def wide(tensor: Tensor) -> torch.dtype:
    """In what its sums are kept: fp64 if it is, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def is_half(tensor: Tensor) -> bool:
    """Are fast products of its fp32 copy no less exact than it is itself? TF32 holds all of fp16."""
    return tensor.dtype == torch.bfloat16 or (tensor.dtype == torch.float16 and tensor.is_cuda)


def lower_gram(matrix: Tensor, total: Tensor | None = None) -> Tensor:
    """The lower triangle of MᵀM, for M (rows, n), added in place to ``total`` (n, n) where there is one.

    Above the diagonal some of it is there and some is not: `symmetric` makes it whole.
    """
    width = matrix.shape[1]
    total = matrix.new_zeros(width, width) if total is None else total
    step = width if width < NARROW else -(-width // BLOCKS)
    for start in range(0, width, step):
        end = min(start + step, width)
        total[start:end, :end].addmm_(matrix[:, start:end].mT, matrix[:, :end])
    return total


def symmetric(lower: Tensor) -> Tensor:
    """Mirrors the lower triangle of (n, n) onto the upper one, in place and without a copy of it all."""
    for start in range(0, len(lower), STRIPE):
        end = start + STRIPE
        corner = lower[start:end, start:end].tril_()
        corner += corner.tril(-1).mT
        lower[start:end, end:] = lower[end:, start:end].mT
    return lower


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, read from its lower half, in its dtype.

    For up to 512 rows in fp32 torch takes Jacobi's method on CUDA, which is slower than another one in fp64
    (9.6 and 3.5 ms for 384 rows on an H100).

    Raises torch.linalg.LinAlgError where that gives up.
    """
    small = matrix.is_cuda and len(matrix) <= SMALL
    values, vectors = torch.linalg.eigh(matrix.double() if small else matrix)
    return values.to(matrix.dtype), vectors.to(matrix.dtype)
