"""Starts from singular triplets of the weight itself: the largest (PiSSA) or the smallest (MiLoRA).

Both are anchored: the start is cancelled beside the frozen weight, which is only read.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from lowrank.init.base import Factors, Given, Start
from lowrank.linalg import Triplets, bottom_singular, frobenius, top_singular

FLOOR = 1e-6  # of the root mean square singular value: below the rounding of any fp32 weight


@dataclass(frozen=True)
class Principal(Start):
    """PiSSA (2404.02948): ``A = √(Σ/s)·Vᵀ``, ``B = U·√(Σ/s)`` of the ``rank`` largest singular triplets.

    ``s·B·A`` is that part of the weight, whatever the scaling s. Singular values that are zero, as in a
    weight of low rank, count as a millionth of the root mean square one (of 1, in a zero weight): with A and
    B both zero no gradient would ever reach them.
    """

    def factors(self, given: Given) -> Factors:
        """A (rank, in) and B (out, rank), fp32, on the weight's device; ``energy`` is the share of ‖W‖²_F.

        Raises:
            ValueError: NaN or Inf in the weight; a rank above min(out, in).
        """
        return _factors(
            given.weight, top_singular(given.weight, given.rank, generator=given.generator), given.scaling
        )


@dataclass(frozen=True)
class Minor(Start):
    """MiLoRA (2406.09044): as `Principal`, with the ``rank`` smallest singular triplets, found in fp64."""

    def factors(self, given: Given) -> Factors:
        """A (rank, in) and B (out, rank), fp32, on the weight's device; ``energy`` is the share of ‖W‖²_F.

        Raises:
            ValueError: NaN or Inf in the weight; a rank above min(out, in).
        """
        return _factors(
            given.weight, bottom_singular(given.weight, given.rank, generator=given.generator), given.scaling
        )


def _factors(weight: Tensor, found: Triplets, scaling: float) -> Factors:
    floor = FLOOR * (frobenius(weight.detach()) / sqrt(min(weight.shape)) or 1.0)
    root = (found.S.clamp_min(floor) / scaling).sqrt()
    return Factors(A=(root[:, None] * found.Vh).float(), B=(found.U * root).float(), energy=found.energy)
