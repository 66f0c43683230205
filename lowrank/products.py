"""How exact products of fp32 tensors are, whatever the program around has set; and Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock

import torch
from torch import Tensor

_SWITCHES = RLock()  # they are the process's, and a backward pass may have a thread for each device
STRIPE = 256  # rows that are mirrored at a time
BLOCKS, NARROW = 6, 256  # of a Gram matrix's rows: 7/12 of it is computed; below the width, all at once


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products are what their dtype says: no TF32 or bf16 inside them, no autocast, no graph."""
    with _products(device, cuda="ieee", cpu="ieee", older="highest"):
        yield


@contextmanager
def fast_precision(device: torch.device) -> Iterator[None]:
    """The factors of an fp32 product may be rounded to TF32 (CUDA) or bf16 (CPU) where hardware gains by it.

    Sums stay fp32. A factor is off by 2⁻⁹ at most: little beside a sum, unless what it sums nearly cancels.
    No autocast and no graph, as in `full_precision`.
    """
    with _products(device, cuda="tf32", cpu="bf16", older="medium"):
        yield


@contextmanager
def _products(device: torch.device, *, cuda: str, cpu: str, older: str) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_SWITCHES)
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9 on
            for backend, precision in (
                (torch.backends.cuda.matmul, cuda),
                (torch.backends.mkldnn.matmul, cpu),  # type: ignore[attr-defined]
            ):
                stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = precision
        else:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision(older)
        yield


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
