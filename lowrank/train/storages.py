"""Counts the bytes of tensors: of those that are there, and of all that come and go while something runs."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Storages(TorchDispatchMode):
    """Inside, notes every storage that an operation makes, and when it is freed; each once, views apart.

    It works on real tensors and on stand-ins without numbers. What a kernel needs inside itself is not seen.
    Storages have numbers, in the order in which they are made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[int, int]] = []  # (number, bytes): made where positive, freed where negative
        self._numbers: dict[int, int] = {}  # of those that are alive, by address
        self._sizes: list[int] = []
        self._watched: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What goes in was there before, unless it is known.
        known = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, known)
        return result

    def _note(self, tensor: Tensor, known: Collection[int]) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in known or address in self._numbers:
            return
        number = len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._numbers[address] = number
        self.changes.append((number, self._sizes[number]))
        self._watched[number] = weakref.ref(storage, partial(self._freed, address, number))

    def _freed(self, address: int, number: int, _: Any) -> None:
        del self._numbers[address], self._watched[number]
        self.changes.append((number, -self._sizes[number]))

    def alive(self) -> set[int]:
        """The numbers of the storages that are held now."""
        return set(self._numbers.values())

    def numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        """The numbers of the storages of ``tensors`` that were made here."""
        found = (self._numbers.get(tensor.untyped_storage()._cdata) for tensor in tensors)
        return {number for number in found if number is not None}

    def size(self, numbers: Iterable[int]) -> int:
        """Their bytes."""
        return sum(self._sizes[number] for number in numbers)

    @property
    def peak(self) -> int:
        """The most bytes that were held at once."""
        return self.size(self._at_peak())

    def at_peak(self, kinds: Mapping[str, Collection[int]]) -> dict[str, int]:
        """What was held when most was, by kind; what is in none of ``kinds`` is "temporary"."""
        held = self._at_peak()
        found = {name: self.size(held.intersection(numbers)) for name, numbers in kinds.items()}
        return {**found, "temporary": self.size(held) - sum(found.values())}

    def _at_peak(self) -> set[int]:
        total = most = until = 0
        for i, (_, change) in enumerate(self.changes, start=1):
            total += change
            if total > most:
                most, until = total, i
        held: set[int] = set()
        for number, change in self.changes[:until]:
            (held.add if change >= 0 and number not in held else held.discard)(number)
        return held


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of ``tensors``, each storage once; of a quantized one, of all its parts."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor subclass of torchao's kind is made of; else the tensor itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or type(tensor).__name__ == "FakeTensor":
        return [tensor]
    return [part for name in flatten()[0] for part in _parts(getattr(tensor, name))]


def free_bytes(device: torch.device) -> int | None:
    """What the device has left for this process and what this process holds of it, in bytes.

    On CUDA that is what the driver has free and what PyTorch's allocator holds. On the CPU it is what Linux
    says is available, and the memory of this process. None where neither is known.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        with open("/proc/meminfo") as lines:
            facts = dict(line.split(":", 1) for line in lines)
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except (OSError, ValueError):
        return None
    import resource

    return int(facts["MemAvailable"].split()[0]) * 1024 + pages * resource.getpagesize()
