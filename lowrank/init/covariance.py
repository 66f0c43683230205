"""The start of CorDA: singular triplets of the weight as the task's inputs weigh it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.init.base import Factors
from lowrank.init.spectrum import bottom_singular, top_singular
from lowrank.projections import Role
from lowrank.statistics import ProjectionStatistics

# Of C's mean diagonal, as the authors'; they double it until C can be inverted, which in fp64 it is at once.
DAMPING = 0.01


@dataclass(frozen=True)
class CovarianceOriented:
    """CorDA (2406.05223): with ``W·C = U·Σ·Vᵀ``, ``A = √(Σ/s)·Vᵀ·C⁻¹`` and ``B = U·√(Σ/s)``; anchored.

    C is the second moment of the inputs. ``preserve=False`` takes the ``rank`` largest triplets, which
    suit the previewed instructions; ``preserve=True`` the smallest, which leave alone what the sampled
    knowledge uses. Where the inputs are all zero, as of an expert that no token was routed to, C is the
    identity, so that the triplets are the weight's own.
    """

    preserve: bool = False

    needs = frozenset({"moment"})

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
        """A (rank, in) and B (out, rank), fp32, on the weight's device; ``energy`` is of W·C.

        Raises:
            ValueError: the moment was not measured; a rank out of range.
        """
        moment = None if statistics is None else statistics.moment
        if moment is None:
            raise ValueError("CovarianceOriented needs the moment of the inputs: pass batches= to wrap_model")
        moment = moment.to(weight.device)
        if not moment.any():
            moment = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        moment.diagonal().add_(DAMPING * moment.diagonal().mean())
        part = bottom_singular if self.preserve else top_singular
        found = part(weight.double() @ moment, rank, generator=generator)
        root = (found.S / scaling).sqrt()
        A = torch.cholesky_solve((root[:, None] * found.Vh).T, torch.linalg.cholesky(moment)).T
        return Factors(A=A.float(), B=(found.U * root).float(), energy=found.energy)
