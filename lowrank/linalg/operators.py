"""Matrices known by what they do to a block of columns: a tensor, a product, an inverse.

`spectrum` asks nothing else of a matrix. Nothing here decides which method to use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

from lowrank.linalg.precision import lower_gram

# A product is formed, and its norm known, where that costs about as much as the iteration at most.
NARROW = 60


def frobenius(matrix: Tensor) -> float:
    """‖M‖_F to fp32 or better; not finite if M is not.

    Raises:
        ValueError: M is on the meta device, where it has no values.
    """
    if matrix.is_meta:
        raise ValueError("the weight is on the meta device: load it first")
    rows = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.promote_types(matrix.dtype, torch.float32))
    norm = float(torch.linalg.vector_norm(rows.double()))
    if 1e-12 < norm < 1e12:
        return norm
    largest = float(matrix.abs().max())  # slower, but squares neither overflow nor vanish
    return largest * float(torch.linalg.vector_norm(matrix.double() / largest)) if largest else largest


def _read(matrix: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    matrix = matrix.detach()
    return (matrix.double() * scale).to(dtype) if scale != 1 else matrix.to(dtype)


class Operator(Protocol):
    """A real matrix M (out, in) of one dtype on one device."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def like(self) -> Tensor:
        """Any tensor with the operator's dtype and device."""
        ...

    def forward(self, columns: Tensor) -> Tensor:
        """M·X, for X (in, k)."""
        ...

    def adjoint(self, columns: Tensor) -> Tensor:
        """Mᵀ·Y, for Y (out, k)."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix held as a tensor."""

    matrix: Tensor

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2:
            raise ValueError(f"expected a matrix (out, in), got a tensor {tuple(self.matrix.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.matrix,)

    @property
    def like(self) -> Tensor:
        return self.matrix

    def forward(self, columns: Tensor) -> Tensor:
        return self.matrix @ columns

    def adjoint(self, columns: Tensor) -> Tensor:
        return (columns.mT @ self.matrix).mT  # on CPUs up to twice as fast as transposing the matrix

    def to(self, dtype: torch.dtype, scales: Sequence[float] = (1.0,)) -> Dense:
        return Dense(_read(self.matrix, dtype, *scales))

    def formed(self) -> Tensor:
        return self.matrix


@dataclass(frozen=True, eq=False)
class Product:
    """``left · right`` (out, inner)·(inner, in), without forming it: two products for each one."""

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(
                f"no product of {tuple(self.left.shape)} and {tuple(self.right.shape)}: the left factor is "
                "(out, inner), the right one (inner, in)"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.left, self.right

    @property
    def like(self) -> Tensor:
        return self.left

    def forward(self, columns: Tensor) -> Tensor:
        return self.left @ (self.right @ columns)

    def adjoint(self, columns: Tensor) -> Tensor:
        return ((columns.mT @ self.left) @ self.right).mT

    def to(self, dtype: torch.dtype, scales: Sequence[float] = (1.0, 1.0)) -> Product:
        return Product(_read(self.left, dtype, scales[0]), _read(self.right, dtype, scales[1]))

    def formed(self) -> Tensor:
        return self.left @ self.right

    def cheaper_formed(self, rank: int) -> bool:
        """Whether forming it costs little beside a second product for each block of columns.

        Always on an accelerator, whose large products run at many times the speed of narrow ones.
        """
        (out, inner), into = self.left.shape, self.right.shape[1]
        return self.left.device.type != "cpu" or out * inner * into <= NARROW * (rank + 8) * (
            (out + into) * inner - out * into
        )


class Singular(ValueError):
    """The matrix has no inverse, to the precision at hand."""


class Inverse:
    """``W⁻ᵀ`` of a square W, by LU with pivoting: its singular vectors are W's, in reverse order."""

    def __init__(self, matrix: Tensor) -> None:
        self.factors, self.pivots, info = torch.linalg.lu_factor_ex(matrix)
        pivots = self.factors.diagonal().abs()
        if int(info) or float(pivots.min()) <= 1e-8 * float(pivots.max()):
            raise Singular("a pivot is zero or nearly so")
        self.blind = 0.0  # singular values below it look like zero

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors.shape[0], self.factors.shape[1]

    @property
    def like(self) -> Tensor:
        return self.factors

    def forward(self, columns: Tensor) -> Tensor:
        return torch.linalg.lu_solve(self.factors, self.pivots, columns, adjoint=True)

    def adjoint(self, columns: Tensor) -> Tensor:
        return torch.linalg.lu_solve(self.factors, self.pivots, columns)

    def gram_inverse(self, columns: Tensor) -> Tensor:
        """(WᵀW)⁻¹·X."""
        return self.adjoint(self.forward(columns))


class InverseRoot:
    """``L⁻¹``, where ``L·Lᵀ = WᵀW + δ``: its right singular vectors are W's, in reverse order.

    δ is just above the rounding of WᵀW, so that a rank-deficient W has a factor too; it moves no vector.
    """

    def __init__(self, matrix: Tensor) -> None:
        gram = lower_gram(matrix)
        diagonal = gram.diagonal()
        shift = 4 * torch.finfo(gram.dtype).eps * float(diagonal.sum())
        diagonal += shift
        self.blind = 2 * sqrt(shift)
        self.factor, info = torch.linalg.cholesky_ex(gram)
        if int(info):
            raise Singular("WᵀW is not positive, to the precision at hand")

    @property
    def shape(self) -> tuple[int, int]:
        return self.factor.shape[0], self.factor.shape[1]

    @property
    def like(self) -> Tensor:
        return self.factor

    def forward(self, columns: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, columns, upper=False)

    def adjoint(self, columns: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor.mT, columns, upper=True)

    def gram_inverse(self, columns: Tensor) -> Tensor:
        """(WᵀW + δ)⁻¹·X."""
        return self.adjoint(self.forward(columns))
