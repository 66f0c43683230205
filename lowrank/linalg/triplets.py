"""Singular triplets, and how good they are: measured on the matrix itself, whatever method found them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isfinite, log2, prod, sqrt

import torch
from torch import Tensor

from lowrank.linalg.operators import Dense, Product, frobenius
from lowrank.linalg.precision import full_precision


@dataclass(frozen=True, eq=False)
class Triplets:
    """k singular triplets of a matrix M (out, in): ``M·Vhᵀ = U·diag(S)`` and nearly ``Mᵀ·U = Vhᵀ·diag(S)``.

    U: (out, k), orthonormal columns. S: (k,), descending. Vh: (k, in), orthonormal rows. In fp32;
        fp64 if M is. Of a triplet's two signs it has the one with which the largest entry of its row of Vh
        is positive.
    energy: ΣS² / ‖M‖²_F, the share of M's squared singular values (0 of a zero matrix); None for a
        product that was not formed.
    angle: the sine of the angle between the subspace found and the exact one, estimated from the measured
        residuals and gaps; up to 1 where the values kept and left out are tied, and no answer is
        better than another. Values within M's own rounding count as zero and are left out of it.
    residual: the largest ‖Mᵀuᵢ − σᵢvᵢ‖, measured, as a share of ‖M‖_F (of σ₁, if M was not formed).
    method: what gave the answer: "krylov", "inverse", "gram" or "svd".
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    energy: float | None
    angle: float
    residual: float
    method: str


@dataclass(frozen=True, eq=False)
class Question:
    """What was asked: M in the dtype that is answered in, how many triplets, and how small an angle."""

    matrix: Dense | Product  # times ``scale``, if its squares would overflow or vanish
    rank: int
    tolerance: float
    scale: float = 1.0

    @staticmethod
    def read(matrix: Tensor | Product, rank: int, tolerance: float) -> Question:
        """Checks what was asked. Half precision becomes fp32; a product is formed where that is cheaper."""
        operator = matrix if isinstance(matrix, Product) else Dense(matrix)
        shape, dtypes = operator.shape, [part.dtype for part in operator.parts]
        if not all(dtype.is_floating_point for dtype in dtypes):
            raise ValueError(f"singular triplets need floating-point numbers (dequantize first): {dtypes}")
        if not 1 <= rank <= min(shape):
            raise ValueError(f"rank {rank} is out of range for a matrix {shape}: 1 to {min(shape)}")
        norms = [frobenius(part.detach()) for part in operator.parts]
        if not all(map(isfinite, norms)):
            raise ValueError(f"the matrix {shape} contains NaN or Inf")
        scales = [1.0 if 1e-6 < norm < 1e6 or not norm else 2.0 ** -round(log2(norm)) for norm in norms]
        with full_precision(operator.like.device):
            operator = operator.to(torch.float64 if torch.float64 in dtypes else torch.float32, scales)
            if isinstance(operator, Product) and operator.cheaper_formed(rank):
                operator = Dense(operator.formed())
        return Question(operator, rank, tolerance, prod(scales))

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.like.dtype

    @property
    def rounding(self) -> float:
        """What counts as zero beside σ₁: M's own rounding."""
        return torch.finfo(self.dtype).eps * sqrt(sum(self.matrix.shape))

    def upright(self, dtype: torch.dtype) -> Tensor:
        """M in ``dtype``, formed, and transposed if it is wider than tall."""
        matrix = self.matrix.to(dtype).formed()
        return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


@dataclass(frozen=True, eq=False)
class Answer:
    """Triplets of `Question.upright`, with what is needed to judge them.

    ``neighbour`` is the nearest singular value left out, None if there is none; ``largest`` is at most σ₁.
    """

    question: Question
    matrix: Tensor
    U: Tensor
    S: Tensor
    V: Tensor
    neighbour: float | None
    largest: float

    @cached_property
    def residual(self) -> Tensor:
        return torch.linalg.vector_norm(self.matrix.mT @ self.U - self.V * self.S, dim=0).double()

    @cached_property
    def live(self) -> Tensor:
        """Which singular values are more than rounding."""
        return self.S.double() > self.question.rounding * self.largest

    @property
    def stray(self) -> Tensor:
        """Which of the others have a left vector that Mᵀ does not send to zero."""
        return ~self.live & (self.residual > self.question.rounding * self.largest)

    @cached_property
    def angle(self) -> float:
        """At most ‖residual‖ over the gap to the neighbour, on both sides together (Wedin 1972)."""
        if self.neighbour is None or not bool(self.live.any()):
            return 0.0
        leaning = self.residual / (self.S.double() - self.neighbour).abs()
        angle = float(torch.linalg.vector_norm(leaning[self.live]))
        return min(1.0, angle) if isfinite(angle) else 1.0

    @property
    def rounded(self) -> bool:
        """Whether only rounding is left of the residuals, so that nothing but a tie can be undecided."""
        rounding = torch.finfo(self.S.dtype).eps * sqrt(sum(self.matrix.shape)) * self.largest
        small = (self.residual <= rounding) & (self.residual <= self.question.tolerance * self.S.double())
        return bool(small[self.live].all())

    def triplets(self, method: str, angle: float | None = None) -> Triplets:
        U, V = (self.U, self.V) if self.matrix.shape == self.question.matrix.shape else (self.V, self.U)
        angle = self.angle if angle is None else angle
        return triplets(self.question, U, self.S, V, self.residual, angle, method)


def triplets(
    question: Question, U: Tensor, S: Tensor, V: Tensor, residual: Tensor, angle: float, method: str
) -> Triplets:
    """The triplets in the dtype that was asked for; energy and residual become shares of M's norm."""
    norm = frobenius(question.matrix.matrix) if isinstance(question.matrix, Dense) else None
    energy = None if norm is None else float(S.double().square().sum()) / norm**2 if norm else 0.0
    scale = float(S[0]) if norm is None else norm
    largest = V.gather(0, V.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(V.dtype)
    return Triplets(
        U=(U * signs).to(question.dtype).contiguous(),  # a copy, so that no larger tensor is kept alive
        S=(S.double() / question.scale).to(U.device, question.dtype),
        Vh=(V * signs).mT.to(question.dtype).contiguous(),
        energy=None if energy is None else min(1.0, energy),
        angle=angle,
        residual=float(residual.max()) / scale if scale else 0.0,
        method=method,
    )
