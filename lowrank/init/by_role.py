"""A different start for each role of a projection. Knows roles, and no method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import getattr_static

from lowrank.init.base import (
    NOTHING,
    Factors,
    Given,
    Initializer,
    Start,
    frozen_factors,
    largest_rank,
    needs_of,
    starts_anchored,
)
from lowrank.models.projections import Role


@dataclass(frozen=True)
class ByRole(Start):
    """``ByRole({Role.QUERY: Principal(), Role.VALUE: Minor()}, otherwise=Kaiming())`` is AILoRA (2510.08034).

    Args:
        choices: role → initializer.
        otherwise: for the roles that are not named; None makes such a projection an error.

    Raises:
        ValueError: a key that is no role, or a choice that is no initializer.
    """

    choices: Mapping[Role, Initializer]
    otherwise: Initializer | None = None

    def __post_init__(self) -> None:
        if unknown := [str(key) for key in self.choices if key not in set(Role)]:
            raise ValueError(f"no such role: {', '.join(unknown)}; there are {', '.join(Role)}")
        named = {Role(key): choice for key, choice in self.choices.items()}
        for choice in [*named.values(), *([] if self.otherwise is None else [self.otherwise])]:
            # `needs` is looked up and not asked: of an initializer that cannot be made here it raises
            known = callable(choice) and getattr_static(choice, "needs", None) is not None
            if isinstance(choice, type) or not known:
                raise ValueError(f"expected an initializer, such as Kaiming(), got {choice!r}")
        object.__setattr__(self, "choices", named)

    def __hash__(self) -> int:
        return hash((frozenset(self.choices.items()), self.otherwise))

    @property
    def needs(self) -> frozenset[str]:
        chosen = [*self.choices.values(), *([] if self.otherwise is None else [self.otherwise])]
        return NOTHING.union(*(choice.needs for choice in chosen))

    def needs_by_role(self, role: Role) -> frozenset[str]:
        """What the initializer of that role needs."""
        return needs_of(self._of(role), role)

    def frozen(self, role: Role) -> frozenset[str]:
        """What the initializer of that role will not train."""
        return frozen_factors(self._of(role), role)

    def anchored(self, role: Role) -> bool:
        """Whether the initializer of that role may start B away from zero."""
        return starts_anchored(self._of(role), role)

    def largest_rank(self, shape: tuple[int, int], role: Role) -> int:
        """The largest rank that the initializer of that role can make of a weight ``(out, in)``."""
        return largest_rank(self._of(role), shape, role)

    def factors(self, given: Given) -> Factors:
        """What the initializer of ``role`` makes of it.

        Raises:
            ValueError: nothing is chosen for that role; the message lists the roles named and not named.
        """
        chosen = self._of(given.role)
        return chosen(
            given.weight,
            given.rank,
            given.scaling,
            role=given.role,
            statistics=given.statistics,
            generator=given.generator,
        )

    def _of(self, role: Role) -> Initializer:
        chosen = self.choices.get(role, self.otherwise)
        if chosen is None:
            missing = ", ".join(r for r in Role if r not in self.choices)
            raise ValueError(
                f"no initializer for the role {role.value!r}. Named: {', '.join(self.choices) or 'none'}; "
                f"not named: {missing}. Name it, give otherwise=, or leave such projections out of the target"
            )
        return chosen
