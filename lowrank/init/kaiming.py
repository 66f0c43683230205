"""The usual starts of LoRA (2106.09685): A random, B zero, so that ΔW is zero at first.

Only the weight's shape and device are looked at: nothing is copied, whatever its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from lowrank.init.base import NOTHING, Factors
from lowrank.projections import Role
from lowrank.statistics import ProjectionStatistics


@dataclass(frozen=True)
class Kaiming:
    """A Kaiming-uniform with a = √5, as in the authors' code: uniform on ±1/√in. B zero."""

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
        """A (rank, in), drawn where the generator lives, and B (out, rank); fp32, on the weight's device."""
        bound = 1 / sqrt(weight.shape[1])
        A = torch.empty(rank, weight.shape[1], dtype=torch.float32, device=generator.device)
        return _with_zero(weight, A.uniform_(-bound, bound, generator=generator))


@dataclass(frozen=True)
class Gaussian:
    """A normal with standard deviation 1/rank. B zero."""

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
        """A (rank, in), drawn where the generator lives, and B (out, rank); fp32, on the weight's device."""
        A = torch.empty(rank, weight.shape[1], dtype=torch.float32, device=generator.device)
        return _with_zero(weight, A.normal_(0, 1 / rank, generator=generator))


def _with_zero(weight: Tensor, A: Tensor) -> Factors:
    B = torch.zeros(weight.shape[0], A.shape[0], dtype=torch.float32, device=weight.device)
    return Factors(A=A.to(weight.device), B=B)
