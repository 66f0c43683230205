"""One kind of sum for each distinct input of the projections: those that read the same tensor share it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lowrank.calibration.accumulators import Rows, Sum
from lowrank.models.projections import Projection
from lowrank.processes import Processes


class _Seen:
    """An input tensor of the present example, told again by where it lies.

    An address means something only while its tensor lives: afterwards another may be put there.
    """

    def __init__(self, x: Tensor) -> None:
        self.place = _place(x)
        self.tensor = weakref.ref(x)

    def is_same(self, x: Tensor) -> bool:
        return self.tensor() is not None and self.place == _place(x)


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.storage_offset(), x.shape, x.stride(), x._version, x.dtype


class Inputs:
    """``make()`` is the sum of an input; ``sums`` has them by the name of the first module that read it."""

    def __init__(self, make: Callable[[], Sum], projections: Sequence[Projection]) -> None:
        self.make, self.projections = make, frozenset(projections)
        self.sums: dict[str, Sum] = {}
        self.reads: dict[Projection, str] = {}
        self.seen: dict[str, list[_Seen]] = {}

    def begin(self) -> None:
        """A new example: tensors of an earlier one are forgotten."""
        self.seen.clear()

    def see(
        self, name: str, held: Sequence[Projection], x: Tensor, rows: Callable[[], Rows], number: int
    ) -> None:
        """``x`` is what the projections ``held`` read in batch ``number``; ``name`` is theirs alone.

        The first time, siblings that read the very same tensor are put together, and only one of them
        counts from then on. Raises ValueError where they part later.
        """
        own = [p for p in held if p in self.projections]
        if not own:
            return
        if own[0] not in self.reads:
            same = [n for n in self.seen if _siblings(n, name) and self._saw(n, x)]
            self.reads.update(dict.fromkeys(own, same[0] if same else name))
        first = self.reads[own[0]]
        if first == name:
            self.seen.setdefault(name, []).append(_Seen(x))
            self.sums.setdefault(name, self.make()).add(rows())
        elif not self._saw(first, x):
            raise ValueError(
                f"{name} and {first} read the same input at first, but not in batch {number}: "
                f"they cannot be measured together; measure them apart, with exclude="
            )

    def reduce(self, processes: Processes, zeros: Callable[[Projection], Tensor]) -> None:
        """Adds the sums of all processes. An expert may have seen no token in some of them.

        Raises ValueError, in all, where projections read the same tensor in one process and not in another.
        """
        everyone = processes.gathered(self.reads)
        self.reads = {p: name for reads in everyone for p, name in reads.items()}
        for p, name in ((p, name) for reads in everyone for p, name in reads.items()):
            if name != (other := self.reads[p]):
                raise ValueError(
                    f"{p.name} reads the input of {name} in one process and that of {other} in another: "
                    "they cannot be measured together; measure them apart, with exclude="
                )
        for name in sorted(set(self.reads.values())):
            reader = next(p for p, read in self.reads.items() if read == name)
            sum_ = self.sums.setdefault(name, self.make())
            sum_.reduce(lambda reader=reader: zeros(reader), processes.added)  # type: ignore[misc]

    def of(self, p: Projection) -> Sum | None:
        """The sum of what ``p`` reads; None where it was never called."""
        return self.sums.get(self.reads.get(p, ""))

    def _saw(self, name: str, x: Tensor) -> bool:
        return any(each.is_same(x) for each in self.seen.get(name, ()))


def _siblings(path: str, other: str) -> bool:
    return path.rpartition(".")[0] == other.rpartition(".")[0]
