"""A policy: which projections to adapt, how much to spend, and how to start. Pure data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

from lowrank.allocate import Allocator, Uniform
from lowrank.init import Initializer, Kaiming
from lowrank.projections import Role
from lowrank.targets import Target


@dataclass(frozen=True)
class Policy:
    """What `wrap_model` is asked to do. Checked when it is made; the presets are policies.

    Args:
        target: ``"all-linear"`` (all but embeddings, heads and what ``train`` names), a role such as
            ``"query"``, a dotted-suffix pattern with ``*`` (``"layers.1*.mlp.up_proj"``), several of
            these, or a predicate of a `Projection`.
        exclude: names of projections, or of modules around them, to leave out.
        rank: the uniform rank; also the budget, where ``budget`` is None.
        budget: trainable adapter parameters: a count, or a fraction of the model's parameters (0 < f < 1).
        alpha: the scaling is alpha / rank (the allocator may refine it).
        init: how the factors start.
        allocate: how the budget is spent.
        dropout: on the adapters' inputs, in training.
        train: modules trained in full and saved with the adapter, such as a new classifier head.
        fused: rows by role of a fused weight that its shape alone cannot tell, by name:
            ``{"qkv_proj": {"query": 4096, "key": 1024, "value": 1024}}``.
        seed: of every random draw in wrapping.

    Raises:
        ValueError: a value out of range; the message says which.
    """

    target: Target = "all-linear"
    exclude: Sequence[str] = ()
    rank: int = 8
    budget: int | float | None = None
    alpha: float = 16.0
    init: Initializer = field(default_factory=Kaiming)
    allocate: Allocator = field(default_factory=Uniform)
    dropout: float = 0.0
    train: Sequence[str] = ()
    fused: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if not _whole(self.rank) or self.rank < 1:
            raise ValueError(f"rank must be a whole number, at least 1: {self.rank!r}")
        if not _number(self.alpha) or not isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(f"alpha must be positive: {self.alpha!r}")
        if not _number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1: {self.dropout!r}")
        if not _whole(self.seed):
            raise ValueError(f"seed must be a whole number: {self.seed!r}")
        counted = _whole(self.budget) and self.budget >= 1  # type: ignore[operator]
        fraction = isinstance(self.budget, float) and 0 < self.budget < 1
        if not (self.budget is None or counted or fraction):
            raise ValueError(
                "budget is a count of trainable parameters (a whole number) or a fraction of the model's "
                f"(between 0 and 1): {self.budget!r}"
            )
        if not isinstance(self.fused, Mapping) or not all(map(_is_rows, self.fused.values())):
            raise ValueError(
                'fused says rows by role for each name, such as {"qkv_proj": {"query": 64, "key": 16, '
                f'"value": 16}}}}: {self.fused!r}'
            )
        for name in ("init", "allocate"):
            choice = getattr(self, name)
            if not callable(choice) or isinstance(choice, type) or not hasattr(choice, "needs"):
                example = "Kaiming()" if name == "init" else "Uniform()"
                raise ValueError(f"{name} takes an instance, such as {name}={example}: {choice!r}")

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that must be measured before this policy can be applied."""
        return self.init.needs | self.allocate.needs


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rows(said: object) -> bool:
    return isinstance(said, Mapping) and all(role in set(Role) and _whole(n) for role, n in said.items())
