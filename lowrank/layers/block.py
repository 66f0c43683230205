"""What an adapter adds to some rows of a weight, as plain tensors: what all products take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lowrank.linalg.rows import Rows


class Block(NamedTuple):
    """One adapter on some output rows of a weight: ``ΔW[rows] = scaling · B·A``.

    The rows are ``(start, stop)``, or pieces of that: see `linalg.rows`. A is ``(r, in)``, B is
    ``(rows, r)``; any floating dtype. With an anchor, A0 ``(r, in)`` and B0 ``(rows, r)`` are the start and
    A, B are the offsets from it (zero at first):
    ``ΔW[rows] = scaling · (B·(A0 + A) + B0·A)``. Anchors are constants: they get no gradient.
    """

    rows: Rows
    A: Tensor
    B: Tensor
    scaling: float
    A0: Tensor | None = None
    B0: Tensor | None = None


def same_blocks(before: Sequence[Block], now: Sequence[Block]) -> bool:
    """Have they the same rows and scalings, and the very same factors?"""
    return len(before) == len(now) and all(
        a.rows == b.rows
        and a.scaling == b.scaling
        and all(getattr(a, each) is getattr(b, each) for each in ("A", "B", "A0", "B0"))
        for a, b in zip(before, now, strict=True)
    )
