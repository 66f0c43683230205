"""What the processes of a run do together: copies of a model (DDP), or one sharded model (FSDP2).

They say who writes, what all have seen, whether one has failed, and which module they call. Gradients are
`together`'s affair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lowrank.batches import model_device
from lowrank.processes import Processes, is_sharded, shards, whole
from lowrank.train.groups import Groups
from lowrank.train.single import SingleProcess

WIDTH = 4  # numbers that a process says at once; always so many, so that a failure can be said at any time
CALLS = (
    "a sharded model must call the same modules in every process, in the same order, but {}: do not shard a "
    "module by itself that some batches leave out, only the layer around it; in evaluate= and in callbacks "
    "every process must call the model equally often"
)


class Together(SingleProcess):
    """All processes of the default group. Each says a few numbers now and then; an error is said likewise.

    A sharded module is gathered when it is called, from what all processes hold of it. Where they call
    different ones, the weights of two modules are mixed up, or a process waits for ever or aborts. So before
    each such call the processes say which it is, where that can be said on the CPU: it would wait for a GPU.
    """

    def __init__(self, model: nn.Module, sharded: bool) -> None:
        self.processes, self.sharded = Processes(model_device(model)), sharded
        self.rank, self.size = self.processes.rank, self.processes.number
        self.told = False  # do the others know of this process's failure, or cannot be told?
        told = shards(model) if self.processes.on_cpu else []
        self._called = {module: name for name, module in model.named_modules() if module in told}
        self._names = ["none", *(name or "the model" for name in self._called.values())]
        self._backward = False

    def exchange(self, *values: float, error: Exception | None = None, call: int = 0) -> Tensor:
        """What each process says, (processes, WIDTH) in fp64. Raises in all where one has an error.

        call: which sharded module this process is about to call, counted from 1. Raises ValueError in all
            where another process is elsewhere.
        """
        table = torch.zeros(self.size, 2 + WIDTH, dtype=torch.float64)
        table[self.rank, : 2 + len(values)] = torch.tensor([float(error is not None), call, *values]).double()
        table = self.processes.added(table)
        if table[:, 0].any():
            self.told = True
            self.processes.raise_told(error, "training")
        calls = [self._names[int(each)] for each in table[:, 1].tolist()]
        if len(set(calls)) > 1:
            self.told = True
            raise ValueError(
                CALLS.format(", ".join(f"rank {i} calls {name}" for i, name in enumerate(calls)))
            )
        return table[:, 2:]

    @contextmanager
    def sharded_forward(self) -> Iterator[None]:
        """Around a forward of a sharded model: what is raised inside can be said, or it cannot."""
        try:
            yield
        except Exception:
            self.told = self.told or not self._called
            raise

    @contextmanager
    def sharded_backward(self) -> Iterator[None]:
        """Around its backward, where the others wait and nothing can be said."""
        self._backward = True
        try:
            yield
        except Exception:
            self.told = True
            raise
        finally:
            self._backward = False

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
        with ExitStack() as scope:
            for call, module in enumerate(self._called, start=1):
                # Before FSDP2's own hook, which gathers the module.
                handle = module.register_forward_pre_hook(partial(self._say, call), prepend=True)
                scope.callback(handle.remove)
            try:
                yield
            except Exception as error:
                if not self.told:
                    self.told = True
                    self.exchange(error=error)
                raise

    def _say(self, call: int, *call_of: Any) -> None:
        if not self._backward:  # which computes again what forward has called
            self.exchange(call=call)


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
    return inner, Together(inner, bool(sharded))
