"""What an initializer is: a frozen dataclass that turns one weight into two factors.

Each idea has a file of its own beside this one; none of them knows a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lowrank.calibration.statistics import ProjectionStatistics
from lowrank.models.projections import Role

NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Factors:
    """The start of one adapter, ``ΔW = scaling · B·A``.

    A is ``(rank, in)``, B is ``(out, rank)``, both fp32. Where B starts at zero the adapter starts
    at ``ΔW = 0``; otherwise the start is an anchor, which training leaves but which changes nothing
    at first. ``frozen`` names the factors that are not trained. ``energy`` is the share of the
    squared singular values that the factors hold, for initializers that know it.
    """

    A: Tensor
    B: Tensor
    frozen: frozenset[str] = NOTHING
    energy: float | None = None


@dataclass(frozen=True)
class Given:
    """What an initializer is called with: the arguments of `Initializer.__call__`."""

    weight: Tensor
    rank: int
    scaling: float
    role: Role
    statistics: ProjectionStatistics | None
    generator: torch.Generator


@runtime_checkable
class Initializer(Protocol):
    """Chooses the factors of one projection.

    ``needs`` says which statistics must be measured first: of ``{"covariance", "moment", "sensitivity",
    "gradient"}``. An initializer may say more, each for a role:

    - ``needs_by_role(role) -> frozenset[str]``, where needs differ by role, so that no more is
      measured than is used;
    - ``frozen(role) -> frozenset[str]``, the factors that it does not train: a plan counts what is left;
    - ``largest_rank(shape, role) -> int``, with shape ``(out, in)``, where it cannot make every rank up to
      ``min(out, in)``: a plan is within its limits before anything is measured;
    - ``anchored(role) -> bool``, whether B starts away from zero, for a memory report; else it may.
    """

    @property
    def needs(self) -> frozenset[str]: ...

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
        """Factors for ``weight`` (out, in), on its device, in fp32. The weight is only read."""
        ...


class Start:
    """The call of this library's own initializers, said once: each says in `factors` what it makes of it.

    Another library's initializer need not derive from it.
    """

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
        """See `Initializer`."""
        return self.factors(Given(weight, rank, scaling, role, statistics, generator))

    def factors(self, given: Given) -> Factors:
        """Factors for ``given.weight`` (out, in), on its device, in fp32."""
        raise NotImplementedError


def frozen_factors(initializer: Initializer, role: Role) -> frozenset[str]:
    """The factors that ``initializer`` will not train in a projection of that role."""
    declared = getattr(initializer, "frozen", None)
    return declared(role) if declared is not None else NOTHING


def largest_rank(initializer: Initializer, shape: tuple[int, int], role: Role) -> int:
    """The largest rank that ``initializer`` can make of a weight ``(out, in)`` of that role; 0 where none."""
    declared = getattr(initializer, "largest_rank", None)
    most = min(shape)
    return most if declared is None else max(0, min(most, declared(shape, role)))


def starts_anchored(initializer: Initializer, role: Role) -> bool:
    """May B start away from zero? Then the start is kept beside the factors, where A trains."""
    declared = getattr(initializer, "anchored", None)
    return "A" not in frozen_factors(initializer, role) and (declared is None or declared(role))


def needs_of(initializer: Initializer, role: Role) -> frozenset[str]:
    """The statistics that ``initializer`` needs of a projection of that role."""
    declared = getattr(initializer, "needs_by_role", None)
    return declared(role) if declared is not None else frozenset(initializer.needs)
