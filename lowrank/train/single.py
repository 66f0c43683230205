"""A run in one process, which `parallel` has for several.

The loop asks such an object instead of asking whether it is alone: who writes, what all processes have seen,
whether one of them has failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from lowrank.train.groups import Groups


class SingleProcess:
    """One process, which is also the one that writes."""

    rank = 0
    size = 1

    @property
    def writes(self) -> bool:
        """Does this process show the bar, and write the log and the checkpoints?"""
        return self.rank == 0

    def accumulating(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward of one batch."""
        return nullcontext()

    def sum(self, value: float) -> float:
        """Over all processes."""
        return value

    def largest(self, *values: int) -> list[int]:
        """Of each value the largest in any process."""
        return list(values)

    def mean(self, scores: dict[str, float]) -> dict[str, float]:
        """Over the processes that give any. Raises ValueError where they give other ones."""
        return scores

    def planned(self, groups: Groups) -> Groups:
        """``groups`` with as many steps as all processes will take."""
        return groups

    def seed(self, seed: int) -> int:
        """Another one for each process, so that each drops out other entries."""
        return seed

    def state(self, state: dict[str, Any]) -> dict[str, Any]:
        """What is to be saved of a run: tensors whole, and what is this process's own."""
        return state

    def own(self, state: dict[str, Any]) -> dict[str, Any]:
        """Of what `state` gave, what this process continues from."""
        return state

    def by_writer(self, act: Callable[[], None]) -> None:
        """``act()`` in the process that writes, while the others wait."""
        act()

    def wait(self) -> None:
        """Until all processes are here."""

    def check_same(self, value: int, what: str) -> None:
        """Raises ValueError where ``value`` is not the same in all processes."""

    def check_scaling(self, scaled: bool) -> None:
        """Raises ValueError where a scaled loss cannot be taken care of."""

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What is raised inside by one process is raised in all."""
        yield
