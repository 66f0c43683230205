"""The start from a QR decomposition of the weight (OLoRA). Anchored: the frozen weight is only read."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch

from lowrank.init.base import Factors, Given, Start
from lowrank.linalg import frobenius
from lowrank.linalg.precision import full_precision


@dataclass(frozen=True)
class Orthogonal(Start):
    """OLoRA (2406.01775): with ``W = Q·R``, ``B = Q[:, :rank]`` and ``A = R[:rank]``, whatever the scaling.

    The first columns of Q depend on the first columns of W alone, and ``R[:rank] = Bᵀ·W``, so a QR of
    (out, rank) and one product are enough.
    """

    def factors(self, given: Given) -> Factors:
        """A (rank, in) and B (out, rank), fp32, on the weight's device; ``energy`` is the share of ‖W‖²_F.

        Raises:
            ValueError: NaN or Inf in the weight; a rank above min(out, in).
        """
        if not 1 <= given.rank <= min(given.weight.shape):
            raise ValueError(f"rank {given.rank} is out of range for a weight {tuple(given.weight.shape)}")
        norm = frobenius(given.weight.detach())
        if not isfinite(norm):
            raise ValueError(f"the weight {tuple(given.weight.shape)} contains NaN or Inf")
        with full_precision(given.weight.device):
            W = given.weight.detach().to(torch.promote_types(given.weight.dtype, torch.float32))
            B = torch.linalg.qr(W[:, : given.rank]).Q
            A = B.mT @ W
        energy = min(1.0, float(A.double().square().sum()) / norm**2) if norm else 0.0
        return Factors(A=A.float().contiguous(), B=B.float().contiguous(), energy=energy)
