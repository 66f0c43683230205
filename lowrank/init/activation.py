"""The start of EVA: A spans where the inputs vary most."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank.init.base import Factors, Given, Start
from lowrank.linalg import top_singular
from lowrank.models.projections import Role


@dataclass(frozen=True)
class ActivationPrincipal(Start):
    """EVA (2410.07170): A is the ``rank`` leading principal directions of the inputs, B is zero; both train.

    The directions are those of the inputs' covariance around their common mean. A's rows are orthonormal.
    """

    needs = frozenset({"moment"})

    def anchored(self, role: Role) -> bool:
        """B is zero."""
        return False

    def factors(self, given: Given) -> Factors:
        """A (rank, in) and B (out, rank), fp32, on the weight's device; ``energy`` is of the covariance.

        Raises:
            ValueError: the moment was not measured; a rank out of range.
        """
        if given.statistics is None or given.statistics.token_covariance is None:
            raise ValueError(
                "ActivationPrincipal needs the moment of the inputs: pass batches= to wrap_model"
            )
        found = top_singular(
            given.statistics.token_covariance.to(given.weight.device), given.rank, generator=given.generator
        )
        B = torch.zeros(given.weight.shape[0], given.rank, dtype=torch.float32, device=given.weight.device)
        return Factors(A=found.Vh.float(), B=B, energy=found.energy)
