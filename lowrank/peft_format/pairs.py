"""A whole update as one pair of factors: what an anchor, row blocks and a rank for all become.

Numbers only; it knows no file and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank.layers.adapter import Adapter
from lowrank.linalg import closest_product
from lowrank.linalg.rows import Rows, copy_


class Pair(NamedTuple):
    """``ΔW = scaling · B·A`` of a whole weight: A ``(rank, in)``, B ``(out, rank)``.

    Of a tensor of experts, both have the experts as another first dimension.
    """

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[-2]


def plain(adapter: Adapter, dtype: torch.dtype) -> Pair:
    """The adapter without its anchor, on the CPU: of rank 2r, ``[b, B₀]·[A₀ + a; a]``, where it had one."""
    A, B = (factor.detach().cpu().to(dtype) for factor in (adapter.A, adapter.B))
    if adapter.A0 is not None and adapter.B0 is not None:
        A0, B0 = (factor.cpu().to(dtype) for factor in (adapter.A0, adapter.B0))
        A, B = torch.cat([A0 + A, A]), torch.cat([B, B0], 1)
    return Pair(A, B, adapter.scaling)


def recompressed(pair: Pair, rank: int, dtype: torch.dtype) -> Pair:
    """The closest pair of ``rank`` (Eckart and Young, 1936), with its singular values shared evenly."""
    B, A, _ = closest_product(pair.B, pair.A, rank)
    return Pair(A.to(dtype), B.to(dtype), pair.scaling)


def stacked(blocks: Sequence[tuple[Rows, Pair]], out: int) -> Pair:
    """One pair for a weight of ``out`` rows: the A's of its blocks stacked, each B in its rows and columns.

    The scaling is the blocks' mean by rank; what differs from it goes into B.
    """
    rank = sum(pair.rank for _, pair in blocks)
    scaling = sum(pair.rank * pair.scaling for _, pair in blocks) / rank or 1.0
    A = torch.cat([pair.A for _, pair in blocks])
    B = A.new_zeros(out, rank)
    column = 0
    for rows, pair in blocks:
        copy_(B[:, column : column + pair.rank], rows, pair.B * (pair.scaling / scaling))
        column += pair.rank
    return Pair(A, B, scaling)


def uniform(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The same updates with one rank, padded with zeros, and scaling 1."""
    most = max(pair.rank for pair in pairs.values())
    pad = nn.functional.pad
    return {
        name: Pair(pad(A, (0, 0, 0, most - A.shape[-2])), pad(B * scaling, (0, most - A.shape[-2])), 1.0)
        for name, (A, B, scaling) in pairs.items()
    }


def reduced(pair: Pair) -> Pair:
    """The same update with a rank of at most min(in, out), in fp32 or better."""
    A, B = (factor.float() if factor.dtype.itemsize < 4 else factor for factor in (pair.A, pair.B))
    out, columns = B.shape[0], A.shape[1]
    if pair.rank > min(out, columns):
        product = B @ A
        eye = torch.eye(min(out, columns), dtype=product.dtype)
        A, B = (product, eye) if out < columns else (eye, product)
    return Pair(A.contiguous(), B.contiguous(), pair.scaling)


def relative_distance(one: Pair, other: Pair) -> float:
    """``|ΔW₁ − ΔW₂| / |ΔW₂|`` in the Frobenius norm, in fp64 and without forming either."""

    def norm(*terms: tuple[float, Pair]) -> float:
        B = torch.cat([sign * pair.scaling * pair.B.double() for sign, pair in terms], 1)
        A = torch.cat([pair.A.double() for _, pair in terms])
        # Orthogonal factors do not change the norm, so the small triangular ones have it.
        return float((torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T).norm())

    difference, size = norm((1.0, one), (-1.0, other)), norm((1.0, other))
    return difference / size if size else (0.0 if difference == 0 else float("inf"))
