"""Cuts a user's batches into optimizer steps: how many there are, and which batches each takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Iterating gives, for each of ``steps`` steps, (epoch, place, batches).

    The epoch and the first batch's place in it count from 1. ``size`` batches make a step; the last of an
    epoch takes what is left. ``per_epoch`` is the number of steps in one pass over the batches, or None
    where it is not known.
    """

    batches: Iterable[Any]
    size: int
    steps: int
    per_epoch: int | None

    @classmethod
    def plan(cls, batches: Iterable[Any], epochs: int, steps: int | None, size: int) -> Groups:
        """Raises ValueError where batches are none, or cannot be gone over as often as is asked."""
        if not isinstance(batches, Iterable) or isinstance(batches, Mapping | Tensor):
            raise ValueError(f"batches are a DataLoader, a list or an iterator, not {type(batches).__name__}")
        length = _length(batches)
        if length == 0:
            raise ValueError("there are no batches")
        per_epoch = None if length is None else -(-length // size)
        if steps is not None and epochs != 1:
            raise ValueError("give epochs= or steps=, not both: steps= takes as many epochs as it needs")
        if steps is None and isinstance(batches, Iterator):
            raise ValueError(
                "batches is an iterator, which can be gone over once and has no length: "
                "give steps=, or a DataLoader or list"
            )
        if steps is None and per_epoch is None:
            raise ValueError(f"this {type(batches).__name__} does not know its length, so give steps=")
        return cls(batches, size, steps or epochs * (per_epoch or 0), per_epoch)

    def __iter__(self) -> Iterator[tuple[int, int, list[Any]]]:
        """Takes no batch beyond the last step's. Raises ValueError where an iterator runs dry before."""
        done = epoch = 0
        while done < self.steps:
            source, place, epoch = iter(self.batches), 1, epoch + 1
            while done < self.steps and (group := list(islice(source, self.size))):
                yield epoch, place, group
                place, done = place + len(group), done + 1
            if place == 1:
                raise ValueError("there are no batches" if done == 0 else self._dry(done))
            if done < self.steps and isinstance(self.batches, Iterator):
                raise ValueError(self._dry(done))

    def _dry(self, done: int) -> str:
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
