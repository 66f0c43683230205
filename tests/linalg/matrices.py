"""Matrices with a spectrum that is known, and how to compare parts of them."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)).Q


def with_spectrum(values: Tensor, out: int, into: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix (out, in) of these singular values, between random singular vectors."""
    k = len(values)
    return ((orthonormal(out, k, 1) * values.double()) @ orthonormal(into, k, 2).mT).to(dtype)


def power_law(out: int, into: int, exponent: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """σₖ ∝ k^-exponent."""
    return with_spectrum(torch.arange(1, min(out, into) + 1).double() ** -exponent, out, into, dtype)


def geometric(out: int, into: int, condition: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """σₖ from 1 down to 1/condition, in equal steps of the logarithm."""
    exponents = torch.linspace(0, 1, min(out, into), dtype=torch.float64)
    return with_spectrum(condition**-exponents, out, into, dtype)


def gaussian(out: int, into: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(out, into, generator=generator(seed), dtype=torch.float64).to(dtype)


def exact(matrix: Tensor, rank: int, end: str) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of the top or bottom triplets, by an fp64 SVD."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = slice(0, rank) if end == "top" else slice(len(S) - rank, len(S))
    return U[:, kept], S[kept], Vh[kept]


def part(U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    return (U.double() * S.double()) @ Vh.double()


def distance(found: Tensor, reference: Tensor) -> float:
    """‖found − reference‖_F / ‖reference‖_F."""
    return float((found.double() - reference).norm() / reference.norm())


def angle(rows: Tensor, reference: Tensor) -> float:
    """The sine of the largest angle between the row spaces of two matrices with orthonormal rows."""
    outside = rows.double() - (rows.double() @ reference.double().mT) @ reference.double()
    return float(torch.linalg.matrix_norm(outside, 2))
