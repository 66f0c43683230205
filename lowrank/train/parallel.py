"""What the processes of a run do together: one alone, copies of a model (DDP), or one sharded model (FSDP2).

The loop asks such an object instead of asking whether it is alone: who writes, what all processes have seen,
whether one of them has failed. Gradients are `together`'s affair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lowrank.batches import model_device
from lowrank.processes import Processes, is_sharded, shards, whole
from lowrank.train.groups import Groups

WIDTH = 4  # numbers that a process says at once; always so many, so that a failure can be said at any time


class SingleProcess:
    """One process, which is also the one that writes."""

    rank = 0
    size = 1

    @property
    def writes(self) -> bool:
        """Does this process show the bar, and write the log and the checkpoints?"""
        return self.rank == 0

    def accumulating(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward of one batch."""
        return nullcontext()

    def sum(self, value: float) -> float:
        """Over all processes."""
        return value

    def largest(self, *values: int) -> list[int]:
        """Of each value the largest in any process."""
        return list(values)

    def mean(self, scores: dict[str, float]) -> dict[str, float]:
        """Over the processes that give any. Raises ValueError where they give other ones."""
        return scores

    def planned(self, groups: Groups) -> Groups:
        """``groups`` with as many steps as all processes will take."""
        return groups

    def seed(self, seed: int) -> int:
        """Another one for each process, so that each drops out other entries."""
        return seed

    def state(self, state: dict[str, Any]) -> dict[str, Any]:
        """What is to be saved of a run: tensors whole, and what is this process's own."""
        return state

    def own(self, state: dict[str, Any]) -> dict[str, Any]:
        """Of what `state` gave, what this process continues from."""
        return state

    def by_writer(self, act: Callable[[], None]) -> None:
        """``act()`` in the process that writes, while the others wait."""
        act()

    def wait(self) -> None:
        """Until all processes are here."""

    def check_same(self, value: int, what: str) -> None:
        """Raises ValueError where ``value`` is not the same in all processes."""

    def check_scaling(self, scaled: bool) -> None:
        """Raises ValueError where a scaled loss cannot be taken care of."""

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What is raised inside by one process is raised in all."""
        yield


class Together(SingleProcess):
    """All processes of the default group. Each says a few numbers now and then; an error is said likewise."""

    def __init__(self, device: torch.device, sharded: bool) -> None:
        self.processes, self.sharded = Processes(device), sharded
        self.rank, self.size = self.processes.rank, self.processes.number
        self.told = False  # do the others know of this process's failure, or cannot be told?

    def exchange(self, *values: float, error: Exception | None = None) -> Tensor:
        """What each process says, (processes, WIDTH) in fp64. Raises in all where one has an error."""
        table = torch.zeros(self.size, 1 + WIDTH, dtype=torch.float64)
        table[self.rank, : 1 + len(values)] = torch.tensor([float(error is not None), *values]).double()
        table = self.processes.added(table)
        if table[:, 0].any():
            self.told = True
            self.processes.raise_told(error, "training")
        return table[:, 1:]

    def sum(self, value: float) -> float:
        return float(self.exchange(value)[:, 0].sum())

    def largest(self, *values: int) -> list[int]:
        return [int(value) for value in self.exchange(*values).amax(0)[: len(values)].tolist()]

    def mean(self, scores: dict[str, float]) -> dict[str, float]:
        self.wait()  # a process that failed says so here
        everyone = [each for each in self.processes.gathered(scores) if each]
        if any(list(each) != list(everyone[0]) for each in everyone):
            named = ", ".join(str(sorted(each)) for each in everyone)
            raise ValueError(f"evaluate must give the same scores in all processes, or none; got {named}")
        values = {name: [each[name] for each in everyone] for name in (everyone or [{}])[0]}
        # A mean of equal numbers may be another one.
        return {name: v[0] if len(set(v)) == 1 else fmean(v) for name, v in values.items()}

    def planned(self, groups: Groups) -> Groups:
        steps, rounds = self.exchange(groups.steps, groups.per_epoch or 0)[:, :2].T.tolist()
        known = None if 0 in rounds else int(max(rounds))
        return replace(groups, rounds=known, steps=int(max(steps)))

    def seed(self, seed: int) -> int:
        if self.rank == 0:
            return seed
        return int.from_bytes(hashlib.sha256(f"{seed}, rank {self.rank}".encode()).digest()[:8], "big") >> 1

    def state(self, state: dict[str, Any]) -> dict[str, Any]:
        gathered = tree_map(lambda each: whole(each) if isinstance(each, Tensor) else each, state)
        own = {key: gathered.pop(key) for key in ("data", "generators")}
        return {**gathered, "of each process": self.processes.gathered(own)}

    def own(self, state: dict[str, Any]) -> dict[str, Any]:
        of_each = state.get("of each process", [])
        return {**state, **(of_each[self.rank] if self.rank < len(of_each) else {})}

    def by_writer(self, act: Callable[[], None]) -> None:
        error = None
        if self.writes:
            try:
                act()
            except Exception as raised:
                error = raised
        self.exchange(error=error)

    def wait(self) -> None:
        self.exchange()

    def check_same(self, value: int, what: str) -> None:
        everyone = self.exchange(value)[:, 0].tolist()
        if len(set(everyone)) > 1:
            raise ValueError(f"{what} is not the same in all processes: by rank {list(map(int, everyone))}")

    def check_scaling(self, scaled: bool) -> None:
        if scaled and self.sharded:
            raise ValueError(
                "float16 needs a scaled loss, which a sharded model does not support here: use bfloat16"
            )

    @contextmanager
    def guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self.told:
                self.told = True
                self.exchange(error=error)
            raise


def parallel_of(model: nn.Module) -> tuple[nn.Module, SingleProcess]:
    """The model inside `DistributedDataParallel`, or ``model``, and what its processes do together.

    Raises ValueError where the processes of a group would train models that know nothing of each other, and
    where a weight is spread otherwise than by FSDP2 over all of them.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    processes = Processes()
    if processes.number == 1:
        for module in shards(inner):
            module.reshard()  # type: ignore[operator]
        return inner, SingleProcess()
    sharded = shards(inner)
    for module in sharded:
        module.reshard()  # type: ignore[operator]
    spread: list[tuple[str, Any]] = [(name, p) for name, p in inner.named_parameters() if is_sharded(p)]
    for name, p in spread:
        cuts = [place for place in p.placements if not place.is_replicate()]
        if not sharded or len(cuts) > 1 or p.device_mesh.size() != processes.number:
            raise ValueError(
                f"{name} is spread over processes by tensor parallelism, or over a part of them: fit takes "
                "a model that fully_shard has sharded over all processes"
            )
    if inner is model and not sharded:
        raise ValueError(
            f"there are {processes.number} processes, and each would train a model of its own: pass "
            "torch.nn.parallel.DistributedDataParallel(model), or call fully_shard(model) first"
        )
    return inner, Together(model_device(inner), bool(sharded))
