"""What acts in one layer, found out once and not at each call. It computes nothing.

On small models, and in generation, each line of Python costs as much as the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lowrank.layers.acting import Acting
from lowrank.layers.adapter import Adapter, RowBlocks
from lowrank.layers.block import Block
from lowrank.layers.transient import Transient


class Ready(Transient):
    """The blocks that act in a layer, until another choice is made or anything that they are made of changes.

    Whatever they were read from is looked at again in each call: the choice, its weights, the adapters by
    name, their factors, rows and scalings. The values of the factors are read anew in any case.
    """

    def __init__(self) -> None:
        self._choice: tuple[Any, Any] = (None, None)
        self._read: list[
            tuple[Mapping[str, Any], str, Any]
        ] = []  # where, under which key, and what was there
        self._weights: list[tuple[Tensor, int]] = []  # each with its version
        self._blocks: tuple[Block, ...] = ()
        self.dropout = 0.0  # the largest of what acts

    def blocks(self, acting: Acting, parts: Mapping[str, RowBlocks]) -> tuple[Block, ...]:
        """The blocks of what acts, without dropout, a mixture's weights in their scalings.

        Empty where nothing acts, or where something does that is no block: magnitudes, rows that train apart.
        """
        names, weights = self._choice
        if acting.names is not names or acting.weights is not weights or not self._current():
            self._find(acting, parts)
        return self._blocks

    def _current(self) -> bool:
        for where, key, held in self._read:
            if where.get(key) is not held:
                return False
        for weight, version in self._weights:
            if weight._version != version:
                return False
        return True

    def _find(self, acting: Acting, parts: Mapping[str, RowBlocks]) -> None:
        self._choice = acting.names, acting.weights
        self._read, self._weights, self._blocks, self.dropout = [], [], (), 0.0
        blocks, special = list[Block](), False
        for name in acting.names:
            part = parts.get(name)
            self._read.append((parts, name, part))
            if part is None:
                continue
            special = special or part.rescales or part.tokens is not None
            self._read.append((part.__dict__, "dropout", part.dropout))
            self.dropout = max(self.dropout, part.dropout)
            part.note("called")
            weight = acting.weights.get(name)
            if weight is not None:
                self._read.append((acting.weights, name, weight))
                self._weights.append((weight, weight._version))
            for key, adapter in part._modules.items():
                if not isinstance(adapter, Adapter):
                    continue
                own, factors, anchor = adapter.__dict__, adapter._parameters, adapter._buffers
                self._read.append((part._modules, key, adapter))
                self._read.append((own, "scaling", own["scaling"]))
                held = factors if anchor["A0"] is None else factors | anchor
                self._read += [(factors if each in factors else anchor, each, held[each]) for each in held]
            factor = 1.0 if weight is None else float(weight)
            blocks += [block._replace(scaling=block.scaling * factor) for block in part.blocks()]
        self._blocks = () if special else tuple(blocks)
