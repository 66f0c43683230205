"""Where in the data a run is: goes over the groups of batches, and comes back to the same place later.

Batches are drawn with random numbers of their own, so that an order of examples depends on nothing that the
model draws, and drawing the same batches again gives the same batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lowrank.train.generators import host_generators, set_host_generators
from lowrank.train.groups import Groups

PARTS = ("sampler", "batch_sampler", "dataset")  # of a DataLoader


class Cursor:
    """Iterating gives, for each step that is left, (epoch, place, batches), as `Groups` does.

    Between two steps, ``state_dict()`` says where it is. Loading it takes an epoch's batches again up to that
    place, without training on them, from the random numbers that the epoch began with; batches that have
    ``state_dict`` and ``load_state_dict`` themselves (torchdata's StatefulDataLoader, an iterator that can)
    are asked instead. An iterator that cannot is expected to start anew.

    seed: of the random numbers of the data.
    """

    def __init__(self, groups: Groups, seed: int = 0) -> None:
        self.groups = groups
        self.done = self.epoch = self.taken = 0  # steps; epochs begun; batches taken of this epoch
        self._random = torch.Generator().manual_seed(seed).get_state()
        self._began: dict[str, Any] = {}  # the random numbers with which the epoch began
        self._source: Iterator[Any] | None = None
        self._last: Any = None

    @property
    def batches(self) -> Iterable[Any]:
        return self.groups.batches

    def first(self, count: int) -> list[Any]:
        """The first ``count`` batches of the first epoch, as iterating will give them.

        Everything that a batch may be drawn with is afterwards as it was.

        Raises ValueError where the batches can be gone over only once.
        """
        if isinstance(self.batches, Iterator) and not self._stateful():
            raise ValueError(
                "batches is an iterator, whose first batches cannot be taken twice: no learning rate can be "
                "measured; pass a DataLoader or a list, or give lr= a number"
            )
        numbers = self._generators()
        place = self.batches.state_dict() if self._stateful() else None  # type: ignore[attr-defined]
        self._tell_epoch(0)
        try:
            self._open()
            found = self._take(count)
        finally:
            self._source = None
            self._set_generators(numbers)
            if place is not None:
                self.batches.load_state_dict(place)  # type: ignore[attr-defined]
        if not found:
            raise ValueError(self.groups.ran_dry(0))
        return found

    def __iter__(self) -> Iterator[tuple[int, int, list[Any]]]:
        """Takes no batch beyond the last step's. Raises ValueError where an iterator runs dry before."""
        while self.done < self.groups.steps:
            if self._source is None:
                self._begin()
            group = self._take(self.groups.size)
            if group:
                self.taken, self.done, self._last = self.taken + len(group), self.done + 1, group[-1]
                yield self.epoch, self.taken - len(group) + 1, group
                continue
            if self.groups.rounds is not None and self.done < self.epoch * self.groups.rounds:
                self.done += 1
                yield self.epoch, self.taken + 1, []  # other processes have more batches
                continue
            if self.taken == 0 or isinstance(self.batches, Iterator):
                raise ValueError(self.groups.ran_dry(self.done))
            self._source = None

    def _begin(self) -> None:
        """The next epoch."""
        self.epoch, self.taken = self.epoch + 1, 0
        self._tell_epoch(self.epoch - 1)
        self._began = self._generators()
        self._open()

    def _tell_epoch(self, epoch: int) -> None:
        for part in self._parts():
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)

    def _open(self) -> None:
        with self._drawing(), self._telling(1):
            self._source = iter(self.batches)

    def _take(self, count: int) -> list[Any]:
        assert self._source is not None
        with self._drawing(), self._telling(self.taken + 1):
            return list(islice(self._source, count))

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Inside, torch's CPU generator is that of the data."""
        of_the_model = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            yield
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(of_the_model)

    @contextmanager
    def _telling(self, place: int) -> Iterator[None]:
        """An error of the data, such as a worker's death, says where it was."""
        try:
            yield
        except Exception as error:
            error.add_note(f"lowrank: while taking the batches from batch {place} of epoch {self.epoch} on")
            raise

    # -- saving and loading ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"done": self.done, "epoch": self.epoch, "taken": self.taken}
        state |= {"began": self._began, "now": self._generators(), "batch": fingerprint(self._last)}
        if self._stateful():
            state["batches"] = self.batches.state_dict()  # type: ignore[attr-defined]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the batches are not those that the state was saved with."""
        self.done, self.epoch = state["done"], state["epoch"]
        if self.epoch == 0:
            return
        self._tell_epoch(self.epoch - 1)
        self._began = state["began"]
        self._set_generators(state["began"])
        if self._stateful():
            self.batches.load_state_dict(state["batches"])  # type: ignore[attr-defined]
            self._open()
        else:  # also where an epoch is over: a sampler may draw numbers when it ends
            self._open()
            self._again(state["taken"], state["batch"])
        self.taken = state["taken"]
        self._set_generators(state["now"])

    def _again(self, taken: int, expected: str) -> None:
        """Takes the first ``taken`` batches of the epoch again; the last is the one that it was."""
        self.taken = 0
        while self.taken < taken and (batch := self._take(1)):
            self.taken, self._last = self.taken + 1, batch[0]
        if self.taken < taken:
            raise ValueError(
                f"the checkpoint was saved after batch {taken} of epoch {self.epoch}, and the batches end "
                f"after {self.taken}: pass the batches that the run was started with"
            )
        if fingerprint(self._last) != expected:
            raise ValueError(
                f"batch {taken} of epoch {self.epoch} is not what it was when the checkpoint was saved: "
                "pass the batches that the run was started with, in an order that random numbers of torch, "
                "Python or NumPy decide, or give the batches state_dict and load_state_dict"
            )

    def _stateful(self) -> bool:
        return all(callable(getattr(self.batches, name, None)) for name in ("state_dict", "load_state_dict"))

    def _generators(self) -> dict[str, Any]:
        """Everything that a batch may be drawn with: torch's numbers for data, Python's, NumPy's, its own."""
        own = [part.generator.get_state() for part in self._drawers()]
        return {"torch": self._random, "own": own, **host_generators()}

    def _set_generators(self, saved: Mapping[str, Any]) -> None:
        self._random = saved["torch"]
        for part, state in zip(self._drawers(), saved["own"], strict=True):
            part.generator.set_state(state)
        set_host_generators(saved)

    def _drawers(self) -> list[Any]:
        return [
            part for part in self._parts() if isinstance(getattr(part, "generator", None), torch.Generator)
        ]

    def _parts(self) -> list[Any]:
        """The batches, and the parts of a DataLoader, each once."""
        found: dict[int, Any] = {id(self.batches): self.batches}
        for owner in (self.batches, getattr(self.batches, "batch_sampler", None)):
            for name in PARTS:
                part = getattr(owner, name, None)
                if part is not None:
                    found.setdefault(id(part), part)
        return list(found.values())


def fingerprint(batch: Any) -> str:
    """A hash of the tensors, numbers and strings in ``batch``; of other objects only the type."""
    digest = hashlib.sha256()
    _feed(digest, batch)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}".encode())
        for each in value:
            _feed(digest, each)
    else:
        plain = isinstance(value, str | bytes | int | float | bool | None)
        digest.update(repr(value if plain else type(value).__qualname__).encode())
