"""Whether what something was made from is still the same: the objects, and what tensors hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lowrank.layers.adapter import Adapter, RowBlocks


class Watch:
    """Notes what was read, and says later whether any of it is another object or was written to.

    A tensor has changed when it was moved, or written to by any operation (its version says so). Writing
    through ``.data`` leaves no trace, nor do some optimizers: see `steps`. Inference tensors have no version.
    """

    def __init__(self) -> None:
        self._read: list[tuple[Mapping[str, Any], str, Any]] = []  # where, which key, and what was there
        self._tensors: list[tuple[Tensor, int, int]] = []  # each with its address and its version
        self._memory: list[Tensor] = []  # keeps the addresses from being used again

    def item(self, where: Mapping[str, Any], key: str) -> None:
        self._read.append((where, key, where.get(key)))

    def values(self, tensor: Tensor) -> None:
        self._tensors.append((tensor, tensor.data_ptr(), tensor._version))
        self._memory.append(tensor.detach())

    def adapters(self, part: RowBlocks) -> list[Tensor]:
        """Notes the adapters of ``part``, their factors, magnitudes and scalings; returns their tensors."""
        tensors: list[Tensor] = []
        for key, adapter in part._modules.items():
            if not isinstance(adapter, Adapter):
                continue
            self.item(part._modules, key)
            self.item(adapter.__dict__, "scaling")
            for module in adapter.modules():  # itself, and its magnitudes
                for held in (module._parameters, module._buffers):
                    for each, tensor in held.items():
                        if tensor is not None:
                            self.item(held, each)
                            tensors.append(tensor)
        return tensors

    def unchanged(self) -> bool:
        for where, key, held in self._read:
            if where.get(key) is not held:
                return False
        for tensor, address, version in self._tensors:
            if tensor._version != version or tensor.data_ptr() != address:
                return False
        return True
