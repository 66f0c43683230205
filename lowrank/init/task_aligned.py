"""The start of TLoRA: A spans what the task's inputs bring out of the weight, and only B is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.init.base import Factors
from lowrank.init.spectrum import Product, top_singular
from lowrank.projections import Role
from lowrank.statistics import ProjectionStatistics


@dataclass(frozen=True)
class TaskAligned:
    """TLoRA (2604.18124): A is the first ``rank`` right singular vectors of ``W·C``, frozen; B is zero.

    C (in, in) is the covariance of the projection's inputs, each example centred by itself. A's rows
    are orthonormal, also where W·C has a lower rank than asked for; only the space they span matters.
    """

    needs = frozenset({"covariance"})

    def frozen(self, role: Role) -> frozenset[str]:
        """A, for every role."""
        return frozenset({"A"})

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
        """A (rank, in) and B (out, rank), fp32, on the weight's device.

        ``energy`` is the share of ‖W·C‖²_F; None where W·C is large and was not formed.

        Raises:
            ValueError: no covariance, or one that does not fit the weight; NaN or Inf; a rank out of range.
        """
        B = torch.zeros(weight.shape[0], rank, dtype=torch.float32, device=weight.device)
        covariance = None if statistics is None else statistics.covariance
        if covariance is None:
            raise ValueError(
                "TaskAligned starts from the covariance of the inputs, which was not measured: pass batches= "
                "to wrap_model, or statistics with covariance to the initializer"
            )
        if covariance.shape != (weight.shape[1], weight.shape[1]):
            raise ValueError(
                f"a covariance {tuple(covariance.shape)} does not fit a weight {tuple(weight.shape)}: "
                f"({weight.shape[1]}, {weight.shape[1]}) is needed"
            )
        found = top_singular(Product(weight, covariance.to(weight.device)), rank, generator=generator)
        return Factors(A=found.Vh.float(), B=B, frozen=self.frozen(role), energy=found.energy)
