"""What acts in one layer, found out once and not at each call. It computes nothing.

On small models, and in generation, each line of Python costs as much as the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank.layers.acting import Acting
from lowrank.layers.adapter import RowBlocks
from lowrank.layers.block import Block
from lowrank.layers.transient import Transient
from lowrank.layers.watch import Watch


class Ready(Transient):
    """The blocks that act in a layer, until another choice is made or anything that they are made of changes.

    Whatever they were read from is looked at again in each call: the choice, its weights, the adapters by
    name, their factors, rows and scalings. The values of the factors are read anew in any case.
    """

    def __init__(self) -> None:
        self._choice: tuple[Any, Any] = (None, None)
        self._watch = Watch()
        self._blocks: tuple[Block, ...] = ()
        self.dropout = 0.0  # the largest of what acts

    def blocks(self, acting: Acting, parts: Mapping[str, RowBlocks]) -> tuple[Block, ...]:
        """The blocks of what acts, without dropout, a mixture's weights in their scalings.

        Empty where nothing acts, or where something does that is no block: magnitudes, rows that train apart.
        """
        names, weights = self._choice
        if acting.names is not names or acting.weights is not weights or not self._watch.unchanged():
            self._find(acting, parts)
        return self._blocks

    def _find(self, acting: Acting, parts: Mapping[str, RowBlocks]) -> None:
        self._choice = acting.names, acting.weights
        self._watch, self._blocks, self.dropout = Watch(), (), 0.0
        blocks, special = list[Block](), False
        for name in acting.names:
            part = parts.get(name)
            self._watch.item(parts, name)
            if part is None:
                continue
            special = special or part.rescales or part.tokens is not None
            self._watch.item(part.__dict__, "dropout")
            self.dropout = max(self.dropout, part.dropout)
            part.note("called")
            weight = acting.weights.get(name)
            if weight is not None:
                self._watch.item(acting.weights, name)
                self._watch.values(weight)
            self._watch.adapters(part)
            factor = 1.0 if weight is None else float(weight)
            blocks += [block._replace(scaling=block.scaling * factor) for block in part.blocks()]
        self._blocks = () if special else tuple(blocks)
