"""The start from a QR decomposition of the weight (OLoRA). Anchored: the frozen weight is only read."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from lowrank.init.base import NOTHING, Factors
from lowrank.init.spectrum import frobenius
from lowrank.products import full_precision
from lowrank.projections import Role
from lowrank.statistics import ProjectionStatistics


@dataclass(frozen=True)
class Orthogonal:
    """OLoRA (2406.01775): with ``W = Q·R``, ``B = Q[:, :rank]`` and ``A = R[:rank]``, whatever the scaling.

    The first columns of Q depend on the first columns of W alone, and ``R[:rank] = Bᵀ·W``, so a QR of
    (out, rank) and one product are enough.
    """

    @property
    def needs(self) -> frozenset[str]:
        return NOTHING

    def __call__(
        self,
        weight: Tensor,
        rank: int,
        scaling: float,
        *,
        role: Role,
        statistics: ProjectionStatistics | None,
        generator: torch.Generator,
    ) -> Factors:
        """A (rank, in) and B (out, rank), fp32, on the weight's device; ``energy`` is the share of ‖W‖²_F.

        Raises:
            ValueError: NaN or Inf in the weight; a rank above min(out, in).
        """
        if not 1 <= rank <= min(weight.shape):
            raise ValueError(f"rank {rank} is out of range for a weight {tuple(weight.shape)}")
        norm = frobenius(weight.detach())
        if not isfinite(norm):
            raise ValueError(f"NaN or Inf in a weight {tuple(weight.shape)}: it has no QR decomposition")
        with full_precision(weight.device):
            W = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
            B = torch.linalg.qr(W[:, :rank]).Q
            A = B.mT @ W
        energy = min(1.0, float(A.double().square().sum()) / norm**2) if norm else 0.0
        return Factors(A=A.float().contiguous(), B=B.float().contiguous(), energy=energy)
