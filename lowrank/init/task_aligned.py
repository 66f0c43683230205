"""The start of TLoRA: A spans what the task's inputs bring out of the weight, and only B is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank.init.base import Factors, Given, Start
from lowrank.linalg import Product, top_singular
from lowrank.models.projections import Role


@dataclass(frozen=True)
class TaskAligned(Start):
    """TLoRA (2604.18124): A is the first ``rank`` right singular vectors of ``W·C``, frozen; B is zero.

    C (in, in) is the covariance of the projection's inputs, each example centred by itself. A's rows
    are orthonormal, also where W·C has a lower rank than asked for; only the space they span matters.
    """

    needs = frozenset({"covariance"})

    def frozen(self, role: Role) -> frozenset[str]:
        """A, for every role."""
        return frozenset({"A"})

    def factors(self, given: Given) -> Factors:
        """A (rank, in) and B (out, rank), fp32, on the weight's device.

        ``energy`` is the share of ‖W·C‖²_F; None where W·C is large and was not formed.

        Raises:
            ValueError: no covariance, or one that does not fit the weight; NaN or Inf; a rank out of range.
        """
        B = torch.zeros(given.weight.shape[0], given.rank, dtype=torch.float32, device=given.weight.device)
        covariance = None if given.statistics is None else given.statistics.covariance
        if covariance is None:
            raise ValueError(
                "TaskAligned starts from the covariance of the inputs, which was not measured: pass batches= "
                "to wrap_model, or statistics with covariance to the initializer"
            )
        if covariance.shape != (given.weight.shape[1], given.weight.shape[1]):
            raise ValueError(
                f"a covariance {tuple(covariance.shape)} does not fit a weight {tuple(given.weight.shape)}: "
                f"({given.weight.shape[1]}, {given.weight.shape[1]}) is needed"
            )
        found = top_singular(
            Product(given.weight, covariance.to(given.weight.device)), given.rank, generator=given.generator
        )
        return Factors(A=found.Vh.float(), B=B, frozen=self.frozen(given.role), energy=found.energy)
