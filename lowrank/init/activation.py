"""The start of EVA: A spans where the inputs vary most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.init.base import Factors
from lowrank.init.spectrum import top_singular
from lowrank.projections import Role
from lowrank.statistics import ProjectionStatistics


@dataclass(frozen=True)
class ActivationPrincipal:
    """EVA (2410.07170): A is the ``rank`` leading principal directions of the inputs, B is zero; both train.

    The directions are those of the inputs' covariance around their common mean. A's rows are orthonormal.
    """

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
        """A (rank, in) and B (out, rank), fp32, on the weight's device; ``energy`` is of the covariance.

        Raises:
            ValueError: the moment was not measured; a rank out of range.
        """
        if statistics is None or statistics.token_covariance is None:
            raise ValueError(
                "ActivationPrincipal needs the moment of the inputs: pass batches= to wrap_model"
            )
        found = top_singular(statistics.token_covariance.to(weight.device), rank, generator=generator)
        B = torch.zeros(weight.shape[0], rank, dtype=torch.float32, device=weight.device)
        return Factors(A=found.Vh.float(), B=B, energy=found.energy)
