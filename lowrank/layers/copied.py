"""A copy W + ΔW of one layer's weight, for as long as `lowrank.merged` lasts: a call is then one product.

The base's own weight is not written to. Which layers have a copy is decided above.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lowrank.layers.adapter import RowBlocks, add_updates
from lowrank.layers.bases import plain_weight
from lowrank.layers.transient import Transient
from lowrank.layers.watch import Watch

if TYPE_CHECKING:
    from lowrank.layers.acting import Acting
    from lowrank.layers.linear import LoRALinear


class MergedWeight(Transient):
    """W + ΔW of what acts in one layer, in the weight's dtype and layout, with the bits that `merge` makes.

    The next call makes it again, in the same memory, when anything that it was made of has changed: what
    acts, a mixture's weights, the factors, the magnitudes, the base's weight (see `Watch`). Writing through
    ``.data`` leaves no trace, so a call that builds a graph, as every training step does, sets `stale`.

    Compiled code cannot look: it multiplies by the copy as it is. `renew` makes it again where it must be.
    """

    def __init__(self) -> None:
        self.on = self.stale = False
        self.weight: Tensor | None = None  # (out, in)
        self._choice: tuple[tuple[str, ...], dict[str, Tensor]] = ((), {})
        self._watch = Watch()
        self._parts: list[RowBlocks] = []

    def current(self, layer: LoRALinear, weight: Tensor) -> Tensor | None:
        """The copy as it has to be now, of a plain base's ``weight`` (out, in); None: go by the factors."""
        if not layer.acting.names:
            return None
        if not self._serves(layer.acting) and not self._make(layer, weight):
            return None
        for part in self._parts:
            part.note("called")
        return self.weight

    def as_made(self, acting: Acting, weight: Tensor) -> Tensor | None:
        """The copy, for compiled code; None where it is of another choice, dtype or device."""
        copy = self.weight
        if copy is None or self._choice[0] != acting.names:
            return None
        return copy if copy.dtype == weight.dtype and copy.device == weight.device else None

    def renew(self, layer: LoRALinear, weight: Tensor | None) -> None:
        """Makes the copy now, where it is not what it has to be."""
        if weight is not None and layer.acting.names and not self._serves(layer.acting):
            self._make(layer, weight)

    def drop(self) -> None:
        self.__init__()  # type: ignore[misc]

    def _serves(self, acting: Acting) -> bool:
        names, weights = self._choice
        if acting.names is not names or acting.weights is not weights:
            same = acting.names == names and acting.weights.keys() == weights.keys()
            if not same or any(acting.weights[name] is not weights[name] for name in weights):
                return False
            self._choice = acting.names, acting.weights
        return not self.stale and self.weight is not None and self._watch.unchanged()

    def _make(self, layer: LoRALinear, weight: Tensor) -> bool:
        """Makes it of what acts in ``layer``; says whether it could."""
        acting, base = layer.acting, layer.base
        parts = list(acting.among(layer._parts()))
        if not parts:
            return False
        watch = Watch()
        watch.item(layer._modules, "base")
        watch.item(base._parameters, "weight")
        for name in acting.names:
            watch.item(layer._parts(), name)
        tensors = [cast(Tensor, base.weight), *(factor for _, factor in parts if factor is not None)]
        tensors += [tensor for part, _ in parts for tensor in watch.adapters(part)]
        if any(part.tokens is not None for part, _ in parts) or any(map(unseen, tensors)):
            self._choice = (), {}
            return False
        with torch.inference_mode(False), torch.no_grad():
            for tensor in tensors:
                watch.values(tensor)
            copy = self.weight
            if copy is None or not _alike(copy, weight):
                copy = torch.empty_like(weight)
                # As a parameter's, so that CUDA graphs read it where it is.
                copy._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
            excess = next((layer.excess(part) for part, _ in parts if part.rescales), None)
            copy.copy_(weight)
            add_updates(copy, [block for part, factor in parts for block in part.blocks(factor)], excess)
        self.weight, self.stale, self._watch = copy, False, watch
        self._choice, self._parts = (acting.names, acting.weights), [part for part, _ in parts]
        return True


def unseen(tensor: Tensor) -> bool:
    """Has it no values, or would a change of them not be seen?"""
    return tensor.is_meta or tensor.is_inference()


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


_layers: dict[int, LoRALinear] = {}  # those inside `lowrank.merged`, in any model


def begin(layers: Iterable[LoRALinear]) -> None:
    for layer in layers:
        layer.copied.on = True
        _layers[id(layer)] = layer


def end(layers: Iterable[LoRALinear]) -> None:
    for layer in layers:
        layer.copied.drop()
        _layers.pop(id(layer), None)


def mark_stale(written: Iterable[Tensor] | None = None) -> None:
    """Notes that copies made of these parameters are out of date, which may not show; None: all copies."""
    ids = None if written is None else set(map(id, written))
    for layer in _layers.values():
        if ids is None or any(id(parameter) in ids for parameter in layer.parameters()):
            layer.copied.stale = True


def renew_copies() -> None:
    """Makes every copy again that is out of date: after a change of which compiled code would not know."""
    for layer in _layers.values():
        layer.copied.renew(layer, plain_weight(layer.base))
