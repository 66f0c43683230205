"""What an adapter adds to some rows of a weight, as plain tensors: what all products take."""

from __future__ import annotations

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
