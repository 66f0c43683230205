"""The largest or smallest singular triplets of a matrix: chooses a method by size and rank.

Each method checks what it found; where that is not good enough the next is tried. The last is an fp64 SVD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from math import inf, sqrt

import torch
from torch import Tensor

from lowrank.linalg.krylov import OVERSAMPLING, leading
from lowrank.linalg.operators import Inverse, InverseRoot, Product, Singular, frobenius
from lowrank.linalg.precision import eigh, full_precision, lower_gram
from lowrank.linalg.triplets import Answer, Question, Triplets, triplets

# Below this width, or where a block is a larger share of it, dense methods are faster (benchmarks/results/).
KRYLOV_WIDTH, KRYLOV_SHARE = 512, 1 / 24
# After so many blocks for each column of the matrix the dense methods would have been done too.
KRYLOV_BLOCKS, INVERSE_BLOCKS = 1 / 16, 1 / 40


def top_singular(
    matrix: Tensor | Product, rank: int, *, generator: torch.Generator, tolerance: float = 5e-4
) -> Triplets:
    """The ``rank`` largest singular triplets of a matrix (out, in), or of a product that need not be formed.

    Half precision is read as fp32; fp64 is kept. Large matrices get a block Krylov method, whose start is
    drawn from ``generator`` where that lives: a CPU generator gives the same start on every device. It is
    oversampled, and iterated until `Triplets.angle` is at most ``tolerance`` or only rounding is left. Then
    the part ``U·diag(S)·Vh`` is within √2·``tolerance`` of the exact one, relative to its norm; its energy,
    within ``tolerance``². Small matrices, and large ranks, get an eigendecomposition of the Gram matrix, with
    the same check.

    Raises:
        ValueError: not a matrix of real floating-point numbers; NaN or Inf in it; a rank out of range.
    """
    question = Question.read(matrix, rank, tolerance)
    with full_precision(question.matrix.like.device):
        return next(found for found in _top(question, generator) if found is not None)


def bottom_singular(
    matrix: Tensor, rank: int, *, generator: torch.Generator, tolerance: float = 5e-4
) -> Triplets:
    """The ``rank`` smallest of the min(out, in) singular triplets of a matrix (out, in).

    As `top_singular`, but in fp64 throughout: an fp32 Gram matrix of condition above 1e3 holds nothing of the
    smallest values. Large matrices get the Krylov method on their inverse (an LU of a square W, a Cholesky
    factor of WᵀW + δ otherwise), the others the eigendecomposition of the Gram matrix.
    """
    question = Question.read(matrix, rank, tolerance)
    with full_precision(question.matrix.like.device):
        return next(found for found in _bottom(question, generator) if found is not None)


def _top(question: Question, generator: torch.Generator) -> Iterator[Triplets | None]:
    dtypes = dict.fromkeys((question.dtype, torch.float64))
    if _suits_krylov(question):
        yield from (_krylov(question, dtype, generator) for dtype in dtypes)
    yield from (_gram(question, dtype, top=True) for dtype in dtypes)
    yield _svd(question, top=True)


def _bottom(question: Question, generator: torch.Generator) -> Iterator[Triplets | None]:
    if _suits_krylov(question):
        yield _inverse(question, generator)
    yield _gram(question, torch.float64, top=False)
    yield _svd(question, top=False)


def _suits_krylov(question: Question) -> bool:
    width = min(question.matrix.shape)
    return width >= KRYLOV_WIDTH and question.rank + OVERSAMPLING <= KRYLOV_SHARE * width


def _krylov(question: Question, dtype: torch.dtype, generator: torch.Generator) -> Triplets | None:
    found = leading(
        question.matrix.to(dtype),
        question.rank,
        generator=generator,
        tolerance=question.tolerance,
        blocks=int(KRYLOV_BLOCKS * min(question.matrix.shape)),
        zero=question.rounding,
    )
    if found is None:
        return None
    return triplets(question, found.U, found.S, found.V, found.residual, found.angle, "krylov")


def _inverse(question: Question, generator: torch.Generator) -> Triplets | None:
    """The bottom of W is the top of its inverse."""
    tall = question.upright(torch.float64)
    largest = frobenius(tall) / sqrt(tall.shape[1])  # at most σ₁
    for operator in _inverses(tall):
        nothing = max(operator.blind, torch.finfo(question.dtype).eps * largest)
        found = leading(
            operator,
            question.rank,
            generator=generator,
            tolerance=question.tolerance,
            blocks=int(INVERSE_BLOCKS * tall.shape[1]),
            infinite=1 / nothing if nothing else inf,
        )
        if found is None:
            return None
        # The little that V holds of W's largest directions weighs most in W·V: a step more removes it.
        basis = torch.linalg.qr(operator.adjoint(found.U)).Q
        basis = torch.linalg.qr(operator.adjoint(operator.forward(basis))).Q
        neighbour = 1 / found.following if found.following else inf
        answer = _answer(question, tall, basis, neighbour, largest, operator.gram_inverse)
        # Wedin's bound is far from sharp where most other values are much larger: it guards the inverse.
        if (answer.angle <= 0.1 or answer.rounded) and not bool(answer.stray.any()):
            return answer.triplets("inverse", found.angle)
    return None


def _inverses(tall: Tensor) -> Iterator[Inverse | InverseRoot]:
    """Operators with W's singular vectors and inverse singular values, the faster and sharper one first."""
    if tall.shape[0] == tall.shape[1]:
        with suppress(Singular):
            yield Inverse(tall)
    with suppress(Singular):
        yield InverseRoot(tall)


def _gram(question: Question, dtype: torch.dtype, *, top: bool) -> Triplets | None:
    """From all the eigenvectors of MᵀM, or of M·Mᵀ if M is wide."""
    tall, k = question.upright(dtype), question.rank
    try:
        squares, vectors = eigh(lower_gram(tall))
    except torch.linalg.LinAlgError:  # LAPACK gives up on a few matrices that an SVD can take
        return None
    squares = squares.clamp_min(0)
    others = squares[:-k].flip(0) if top else squares[k:]
    shifted = squares + 4 * torch.finfo(dtype).eps * squares.sum()
    basis = vectors[:, -k:] if top else vectors[:, :k]
    neighbour = sqrt(float(others[0])) if len(others) else None

    def gram_inverse(columns: Tensor) -> Tensor:
        return vectors @ ((vectors.mT @ columns) / shifted[:, None])

    answer = _answer(question, tall, basis, neighbour, sqrt(float(squares[-1])), gram_inverse)
    good = (answer.angle <= question.tolerance or answer.rounded) and not bool(answer.stray.any())
    return answer.triplets("gram") if good else None


def _svd(question: Question, *, top: bool) -> Triplets:
    tall, k = question.upright(torch.float64), question.rank
    U, S, Vh = torch.linalg.svd(tall, full_matrices=False)
    kept, others = (slice(0, k), S[k:]) if top else (slice(len(S) - k, None), S[: len(S) - k].flip(0))
    neighbour = float(others[0]) if len(others) else None
    return Answer(question, tall, U[:, kept], S[kept], Vh[kept].mT, neighbour, float(S[0])).triplets("svd")


def _answer(
    question: Question,
    tall: Tensor,
    basis: Tensor,
    neighbour: float | None,
    largest: float,
    gram_inverse: Callable[[Tensor], Tensor],
) -> Answer:
    """The triplets of ``tall`` whose right vectors span ``basis``."""
    Q, R = torch.linalg.qr(tall @ basis)
    P, S, Zh = torch.linalg.svd(R)
    answer = Answer(question, tall, Q @ P, S, basis @ Zh.mT, neighbour, largest)
    stray = answer.stray
    if not bool(stray.any()):
        return answer
    left = answer.U[:, stray]  # M·v = 0 says nothing of u, so remove from u what Mᵀ does not send to zero
    for _ in range(2):
        left = torch.linalg.qr(left - tall @ gram_inverse(tall.mT @ left)).Q
    return replace(answer, U=answer.U.index_copy(1, stray.nonzero().squeeze(1), left))
