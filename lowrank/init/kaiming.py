"""The usual starts of LoRA (2106.09685): A random, B zero, so that ΔW is zero at first.

An embedding starts the other way round, A zero and B normal, as in the authors' code: a token that training
does not meet keeps its vector. Only the weight's shape and device are looked at: nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from lowrank.init.base import Factors, Given, Start
from lowrank.models.projections import Role


@dataclass(frozen=True)
class Kaiming(Start):
    """A Kaiming-uniform with a = √5, as in the authors' code: uniform on ±1/√in. B zero."""

    def anchored(self, role: Role) -> bool:
        """B is zero."""
        return False

    def factors(self, given: Given) -> Factors:
        """A (rank, in), drawn where the generator lives, and B (out, rank); fp32, on the weight's device."""
        if given.role == Role.EMBEDDING:
            return _looked_up(given)
        bound = 1 / sqrt(given.weight.shape[1])
        A = torch.empty(given.rank, given.weight.shape[1], dtype=torch.float32, device=given.generator.device)
        return _with_zero(given.weight, A.uniform_(-bound, bound, generator=given.generator))


@dataclass(frozen=True)
class FrozenA(Kaiming):
    """A random as in `Kaiming`, and frozen: only B is trained (LoRA-FA, 2308.03303). B zero.

    Of an embedding, where B is the random one, B is frozen.
    """

    def frozen(self, role: Role) -> frozenset[str]:
        return frozenset({"B" if role == Role.EMBEDDING else "A"})

    def factors(self, given: Given) -> Factors:
        """As `Kaiming` makes them."""
        return replace(super().factors(given), frozen=self.frozen(given.role))


@dataclass(frozen=True)
class Gaussian(Start):
    """A normal with standard deviation 1/rank. B zero."""

    def anchored(self, role: Role) -> bool:
        """B is zero."""
        return False

    def factors(self, given: Given) -> Factors:
        """A (rank, in), drawn where the generator lives, and B (out, rank); fp32, on the weight's device."""
        if given.role == Role.EMBEDDING:
            return _looked_up(given)
        A = torch.empty(given.rank, given.weight.shape[1], dtype=torch.float32, device=given.generator.device)
        return _with_zero(given.weight, A.normal_(0, 1 / given.rank, generator=given.generator))


def _with_zero(weight: Tensor, A: Tensor) -> Factors:
    B = torch.zeros(weight.shape[0], A.shape[0], dtype=torch.float32, device=weight.device)
    return Factors(A=A.to(weight.device), B=B)


def _looked_up(given: Given) -> Factors:
    """A zero, B standard normal."""
    out, columns = given.weight.shape
    B = torch.empty(out, given.rank, dtype=torch.float32, device=given.generator.device)
    B.normal_(generator=given.generator)
    A = torch.zeros(given.rank, columns, dtype=torch.float32, device=given.weight.device)
    return Factors(A=A, B=B.to(given.weight.device))
