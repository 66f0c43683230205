"""Starts that the study tries and the library does not have: parts of known methods, put together anew.

One that wins beyond the interval on tasks that it was not chosen on belongs into `lowrank.init`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import torch

from lowrank import Factors, Role
from lowrank.init import Initializer, Minor, Principal
from lowrank.init.base import NOTHING, Given, Start, needs_of
from lowrank.linalg import frobenius


@dataclass(frozen=True)
class RandomDirections(Start):
    """PiSSA's magnitudes on orthonormal directions that are drawn: does the magnitude alone explain PiSSA?

    LoRAM (2507.06558) asks the same with a fixed basis.
    """

    def factors(self, given: Given) -> Factors:
        """A (rank, in) and B (out, rank), fp32, with the norms of PiSSA's rows and columns."""
        found = Principal().factors(given)

        def drawn(size: int) -> torch.Tensor:
            source = torch.empty(size, given.rank).normal_(generator=given.generator)
            return torch.linalg.qr(source).Q.to(given.weight.device)

        out, columns = given.weight.shape
        A = drawn(columns).mT * found.A.norm(dim=1, keepdim=True)
        return Factors(A=A.contiguous(), B=drawn(out) * found.B.norm(dim=0))


@dataclass(frozen=True)
class RaisedMinor(Start):
    """MiLoRA's directions at the root mean square singular value, where gradients are of the usual size."""

    def factors(self, given: Given) -> Factors:
        """A (rank, in) and B (out, rank), fp32."""
        found = Minor().factors(given)
        size = frobenius(given.weight.detach()) / sqrt(min(given.weight.shape)) / given.scaling
        A, B = torch.nn.functional.normalize(found.A, dim=1), torch.nn.functional.normalize(found.B, dim=0)
        return Factors(A=A * sqrt(size), B=B * sqrt(size))


@dataclass(frozen=True)
class Released(Start):
    """Another start with nothing frozen, such as TLoRA's with an A that trains. B is zero there."""

    start: Initializer

    @property
    def needs(self) -> frozenset[str]:
        return self.start.needs

    def needs_by_role(self, role: Role) -> frozenset[str]:
        return needs_of(self.start, role)

    def anchored(self, role: Role) -> bool:
        return False

    def factors(self, given: Given) -> Factors:
        """As the other start makes them."""
        made = self.start(
            given.weight,
            given.rank,
            given.scaling,
            role=given.role,
            statistics=given.statistics,
            generator=given.generator,
        )
        return replace(made, frozen=NOTHING)
