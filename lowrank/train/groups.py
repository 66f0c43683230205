"""Cuts a user's batches into optimizer steps: how many there are, and how many batches each takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """``size`` batches make each of ``steps`` steps; the last of an epoch takes what is left.

    ``length`` is the number of batches in one pass over them, or None where it is not known. `data.Cursor`
    goes over them.
    """

    batches: Iterable[Any]
    size: int
    steps: int
    length: int | None
    rounds: int | None = None  # steps of an epoch in the process that takes the most; the others wait

    @property
    def per_epoch(self) -> int | None:
        """Steps in one pass over the batches."""
        if self.rounds is not None:
            return self.rounds
        return None if self.length is None else -(-self.length // self.size)

    @classmethod
    def plan(cls, batches: Iterable[Any], epochs: int, steps: int | None, size: int) -> Groups:
        """Raises ValueError where batches are none, or cannot be gone over as often as is asked."""
        if not isinstance(batches, Iterable) or isinstance(batches, Mapping | Tensor):
            raise ValueError(
                f"batches: expected a DataLoader, a list or an iterator, got {type(batches).__name__}"
            )
        length = _length(batches)
        if length == 0:
            raise ValueError("there are no batches")
        if steps is not None and epochs != 1:
            raise ValueError("give epochs= or steps=, not both: steps= takes as many epochs as it needs")
        if steps is None and isinstance(batches, Iterator):
            raise ValueError(
                "batches is an iterator, which can be gone over once and has no length: "
                "give steps=, or a DataLoader or list"
            )
        if steps is None and length is None:
            raise ValueError(f"this {type(batches).__name__} does not know its length, so give steps=")
        return cls(batches, size, steps or epochs * -(-(length or 0) // size), length)

    def ran_dry(self, done: int) -> str:
        """Why there are no batches after ``done`` steps, in words."""
        if done == 0:
            return "there are no batches"
        return (
            f"the batches ran out after {done} of {self.steps} steps and cannot be gone over again: "
            "give fewer steps, more batches, or a DataLoader or list"
        )


def _length(batches: Iterable[Any]) -> int | None:
    """``len(batches)``, where there is one; a DataLoader over a stream has ``__len__`` and raises."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:
        return None
