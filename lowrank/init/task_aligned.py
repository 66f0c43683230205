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

    Args:
        sketch: measure ``(W·C)ᵀ·U`` for orthonormal columns U, sketch·rank of them, that hold W·C's left
            directions, and not C: twice (in, sketch·rank) of memory a projection, and three passes over the
            batches, which must be readable several times. With 8, A misses about 1e-5 of the energy of W·C
            that the exact A holds (benchmarks/results/); with 4, some 1e-3 in the worst projections.
    """

    sketch: int | None = None

    def __post_init__(self) -> None:
        if self.sketch is not None and self.sketch < 2:
            raise ValueError(f"sketch must be at least 2 columns a rank: {self.sketch}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"covariance"}) if self.sketch is None else frozenset({"sketch"})

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

        ``energy`` is the share of ‖W·C‖²_F; None where W·C was not formed: where it is large, or sketched.

        Raises:
            ValueError: no covariance, or one that does not fit the weight; NaN or Inf; a rank out of range.
        """
        B = torch.zeros(weight.shape[0], rank, dtype=torch.float32, device=weight.device)
        if statistics is not None and statistics.sketch is not None and "sketch" in self.needs:
            found = top_singular(statistics.sketch.to(weight.device).T, rank, generator=generator)
            return Factors(A=found.Vh.float(), B=B, frozen=self.frozen(role))
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
