"""The leading singular triplets of an operator, from nothing but products with blocks of columns.

Knows neither what the operator is nor what to do where it fails: it then says so by returning None.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log10, sqrt

import torch
from torch import Tensor

from lowrank.linalg.operators import Operator
from lowrank.linalg.precision import eigh

OVERSAMPLING = 8  # columns of a block beyond the rank; a basis is several blocks wide
BLOCKS = 8  # a basis of so many blocks is compressed to its leading vectors


@dataclass(frozen=True, eq=False)
class Leading:
    """``M·V = U·diag(S)`` and nearly ``Mᵀ·U = V·diag(S)``: U, V in the operator's dtype, S in fp64.

    residual: (rank,), ‖Mᵀuᵢ − σᵢvᵢ‖, measured.
    angle: the sine of the angle between V and the exact subspace, estimated from the residuals and gaps.
    following: the first singular value left out.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    residual: Tensor
    angle: float
    following: float


def leading(
    operator: Operator,
    rank: int,
    *,
    generator: torch.Generator,
    tolerance: float,
    blocks: int,
    zero: float = 0.0,
    infinite: float = inf,
) -> Leading | None:
    """The ``rank`` leading triplets; None if ``blocks`` blocks do not bring the angle down to ``tolerance``.

    Block Golub-Kahan-Lanczos with full orthogonalization and thick restarts (Golub, Luk & Overton 1981;
    Baglama & Reichel 2005). It converges like block Krylov (Musco & Musco 1504.05477): at slow spectra in far
    fewer products than the power iterations of a randomized SVD (Halko, Martinsson & Tropp 0909.4061). A
    block is wider than ``rank``, so no multiplicity of singular values hides one. Singular values of at
    most ``zero``·σ₁, and those of at least ``infinite``, count as ties: their vectors are orthonormal, and
    any will do. Residuals at rounding level are accepted too: then only a tie is left undecided.
    """
    out, into = operator.shape
    width = rank + OVERSAMPLING
    limit = min(BLOCKS * width, out, into)
    like = operator.like
    rounding = torch.finfo(like.dtype).eps * sqrt(out + into)  # of a product, as a share of σ₁
    lefts, rights = like.new_empty(out, limit), like.new_empty(into, limit)  # filled from the left
    core = torch.empty(0, 0, dtype=torch.float64, device="cpu")  # M·right = left·core
    block, due = _random(like, into, width, generator), 3
    size = _norm(block)

    for step in range(1, blocks + 1):
        known, count = len(core), len(core) + width
        right, left = rights[:, :count], lefts[:, :count]
        fresh, _ = _extension(right[:, :known], block, size, generator)
        image = operator.forward(fresh)
        answer, inside = _extension(left[:, :known], image, _norm(image), generator)
        right[:, known:], left[:, known:] = fresh, answer
        column = torch.cat([inside, answer.mT @ image]).cpu().double()
        core = torch.cat([torch.cat([core, core.new_zeros(width, known)]), column], 1)
        block = operator.adjoint(answer)
        size = _norm(block)
        block = block - right @ (right.mT @ block)  # Mᵀ·left = right·coreᵀ + [0, block]

        full = count + width > limit
        if step < due and not full:
            continue
        squares, vectors = eigh(core @ core.mT)
        values, vectors = squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
        residual = torch.linalg.vector_norm(block @ vectors[-width:].to(block), dim=0).cpu().double()
        live = (values[:rank] > zero * values[0]) & (values[:rank] < infinite)
        angle = _angle(values, residual, live, rounding)
        if angle <= tolerance or bool((residual[:rank][live] <= rounding * values[0]).all()):
            first = vectors[:, :rank]
            U, V = left @ first.to(left), right @ _partners(core, first).to(right)
            missed = operator.adjoint(U) - V * values[:rank].to(V)
            residual[:rank] = torch.linalg.vector_norm(missed, dim=0).cpu().double()
            angle = _angle(values, residual, live, rounding)
            rounded = bool((residual[:rank][live] <= rounding * values[0]).all())
            relative = bool((residual[:rank][live] <= tolerance * values[:rank][live]).all())
            if angle <= tolerance or (rounded and relative):
                return Leading(U, values[:rank], V, residual[:rank], angle, float(values[rank]))
            if rounded:
                return None  # a spectrum too wide for this dtype: more steps would not help
        due = step + max(1, min(3, int(log10(max(angle, tolerance) / tolerance))))
        if full:
            kept = rank + width // 2
            first = vectors[:, :kept]
            lefts[:, :kept] = left @ first.to(left)
            rights[:, :kept] = right @ _partners(core, first).to(right)
            core = torch.diag(values[:kept])
    return None


def _angle(values: Tensor, residual: Tensor, live: Tensor, rounding: float) -> float:
    """How far the live ones of the first Ritz vectors lean out of the exact subspace, as a sine.

    With g = σ·residual, the leaning out of the basis is at most g over the gap to what lies there, which is
    no larger than the next Ritz value plus its own residual; the leaning towards a Ritz vector that was not
    kept is of second order (Stewart & Sun 1990, chapter V). 1 where a value left out is tied with a kept one.
    """
    rank = len(live)
    if not bool(live.any()):
        return 0.0
    squares, leak = values.square(), values * residual
    kept, others = squares[:rank][live], squares[rank:]
    gap = kept - (others + leak[rank:]).min()
    if float(gap.min()) <= 0 or float(kept[-1].sqrt() - values[rank]) <= rounding * float(values[0]):
        return 1.0
    outside = leak[:rank][live] / gap
    inside = outside[:, None] * leak[rank:] / (kept[:, None] - others)
    return min(1.0, float((outside.square().sum() + inside.square().sum()).sqrt()))


def _partners(core: Tensor, first: Tensor) -> Tensor:
    """The right singular vectors of ``core`` that belong to its left ones, orthonormal even where σ = 0."""
    basis, triangle = torch.linalg.qr(core.mT @ first)
    return torch.where(triangle.diagonal() < 0, -basis, basis)


def _extension(
    basis: Tensor, block: Tensor, size: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of what ``block`` adds to ``basis``, filled up at random; and ``basisᵀ·block``.

    ``size`` is the norm of the block before any projection: what is only rounding beside it adds nothing.

    Projects, then orthonormalizes by the eigenvectors of the block's Gram matrix in fp64 (Stathopoulos & Wu
    2002): a few products, where a QR of a tall block is many small steps. Again, if the block was far from
    orthogonal or lay almost in the basis; what then still shrinks to a tenth was rounding, and is drawn anew.
    """
    noise = 8 * torch.finfo(block.dtype).eps * size
    first = inside = basis.mT @ block
    for _ in range(6):
        before = _norm(block)
        block = block - basis @ inside
        wide = block.double()
        squares, vectors = torch.linalg.eigh((wide.mT @ wide).cpu())
        nothing = int((squares <= noise**2).sum())
        scaled = vectors[:, nothing:] * squares[nothing:].rsqrt()
        block = (wide @ scaled.to(wide)).to(block)
        if nothing:
            block = torch.cat([block, _random(block, block.shape[0], nothing, generator)], 1)
        elif squares[0] > 1e-3 * squares[-1] and squares.sum() > 1e-2 * before**2:
            break
        noise, inside = 0.1, basis.mT @ block
    return block, first


def _norm(block: Tensor) -> float:
    return float(torch.linalg.vector_norm(block))


def _random(like: Tensor, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Unit columns at random; drawn where the generator lives, so that every device starts alike."""
    draw = torch.randn(rows, columns, generator=generator, device=generator.device, dtype=torch.float32)
    return (draw / sqrt(rows)).to(like)
