"""The closest product of a smaller rank to a product of two factors, which is never formed."""

from __future__ import annotations

import torch
from torch import Tensor


def closest_product(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """B' ``(out, rank)`` and A' ``(rank, in)`` whose product is closest to ``B·A`` (Eckart and Young, 1936).

    The singular values are shared evenly by the two. B ``(out, r)`` and A ``(r, in)`` are in one dtype, in
    which all is computed. Returned third are all singular values of ``B·A``, descending: those from ``rank``
    on are left out, and their squares add up to the squared Frobenius norm of the error.
    """
    left, right = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    half = S[:rank].sqrt()
    return (left.Q @ U[:, :rank]) * half, half[:, None] * (Vh[:rank] @ right.Q.T), S
