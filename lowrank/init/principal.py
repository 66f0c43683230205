"""Starts from singular triplets of the weight itself: the largest (PiSSA) or the smallest (MiLoRA).

Both are anchored: the start is cancelled beside the frozen weight, which is only read.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from lowrank.init.base import NOTHING, Factors
from lowrank.init.spectrum import Triplets, bottom_singular, frobenius, top_singular
from lowrank.projections import Role
from lowrank.statistics import ProjectionStatistics

FLOOR = 1e-6  # of the root mean square singular value: below the rounding of any fp32 weight


@dataclass(frozen=True)
class Principal:
    """PiSSA (2404.02948): ``A = √(Σ/s)·Vᵀ``, ``B = U·√(Σ/s)`` of the ``rank`` largest singular triplets.

    ``s·B·A`` is that part of the weight, whatever the scaling s. Singular values that are zero, as in a
    weight of low rank, count as a millionth of the root mean square one (of 1, in a zero weight): with A and
    B both zero no gradient would ever reach them.
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
        return _factors(weight, top_singular(weight, rank, generator=generator), scaling)


@dataclass(frozen=True)
class Minor:
    """MiLoRA (2406.09044): as `Principal`, with the ``rank`` smallest singular triplets, found in fp64."""

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
        return _factors(weight, bottom_singular(weight, rank, generator=generator), scaling)


def _factors(weight: Tensor, found: Triplets, scaling: float) -> Factors:
    floor = FLOOR * (frobenius(weight.detach()) / sqrt(min(weight.shape)) or 1.0)
    root = (found.S.clamp_min(floor) / scaling).sqrt()
    return Factors(A=(root[:, None] * found.Vh).float(), B=(found.U * root).float(), energy=found.energy)
