"""What an initializer is: a frozen dataclass that turns one weight into two factors.

Each idea has a file of its own beside this one; none of them knows a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lowrank.projections import Role
from lowrank.statistics import ProjectionStatistics

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


@runtime_checkable
class Initializer(Protocol):
    """Chooses the factors of one projection.

    ``needs`` says which statistics must be measured first: of ``{"covariance", "moment", "sensitivity",
    "gradient"}``. One whose needs differ by role also has ``needs_by_role(role) -> frozenset[str]``, so that
    nothing is measured in vain. An initializer that freezes a factor also has ``frozen(role) ->
    frozenset[str]``, so that a plan can count trainable parameters before any weight is read.
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


def frozen_factors(initializer: Initializer, role: Role) -> frozenset[str]:
    """The factors that ``initializer`` will not train in a projection of that role."""
    declared = getattr(initializer, "frozen", None)
    return declared(role) if declared is not None else NOTHING


def needs_of(initializer: Initializer, role: Role) -> frozenset[str]:
    """The statistics that ``initializer`` needs of a projection of that role."""
    declared = getattr(initializer, "needs_by_role", None)
    return declared(role) if declared is not None else frozenset(initializer.needs)
