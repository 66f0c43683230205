"""Several processes that work as one, and tensors that are spread over them. It knows no adapter.

Without `torch.distributed`, or in a group of one, everything here is what one process does anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn


class Processes:
    """All processes of the default group; tensors are exchanged on ``device``, by gloo on the CPU.

    on_cpu: can tensors on the CPU be exchanged there? As by gloo, or by a group that was made without naming
        a backend; not by NCCL alone.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        group = torch.distributed
        several = group.is_available() and group.is_initialized()
        self.number = group.get_world_size() if several else 1
        self.rank = group.get_rank() if several else 0
        by_gloo = several and group.get_backend() == "gloo"
        self.on_cpu = several and "gloo" in group.distributed_c10d.get_backend_config()
        self.device = torch.device("cpu" if by_gloo else device)

    @property
    def first(self) -> bool:
        """Is this the process that writes files and shows bars?"""
        return self.rank == 0

    def added(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in the tensor's dtype and where it is."""
        if self.number == 1:
            return tensor
        stays = self.on_cpu and tensor.device.type == "cpu"
        moved = tensor.to("cpu" if stays else self.device, copy=True)
        torch.distributed.all_reduce(moved)
        return moved.to(tensor.device)

    def sums(self, *values: float) -> list[float]:
        """The sum of each over all processes, in fp64."""
        return cast("list[float]", self.added(torch.tensor(values, dtype=torch.float64)).tolist())

    def gathered(self, value: Any) -> list[Any]:
        """What each process says, by rank."""
        if self.number == 1:
            return [value]
        everyone: list[Any] = [None] * self.number
        torch.distributed.all_gather_object(everyone, value)
        return everyone

    @torch.no_grad()
    def take_first(self, tensors: Iterable[Tensor]) -> None:
        """Gives each tensor the values that it has in rank 0, in place."""
        if self.number > 1:
            for tensor in tensors:
                moved = tensor.to(self.device, copy=True).contiguous()
                torch.distributed.broadcast(moved, src=0)
                if self.rank:
                    tensor.copy_(moved)

    def raise_in_all(self, error: BaseException | None, what: str) -> None:
        """Raises ``error``, and in the other processes one with its message. Every process must call it, with
        None where nothing went wrong.

        It is of the same class where that is one of this package, else ValueError where it was one, else
        RuntimeError.
        """
        self.all_done(True, error, what)

    def raise_told(self, error: BaseException | None, what: str) -> None:
        """`raise_in_all`, where all processes know already that one of them has an error."""
        self._raise(error, what)
        if error is not None:
            raise error

    def all_done(self, done: bool, error: BaseException | None = None, what: str = "calibration") -> bool:
        """Is every process done? Each asks before each of its batches, and goes on asking when it is done.

        Raises what `raise_in_all` raises; ``what`` failed, for messages.
        """
        if self.number > 1:
            finished, failed = self.sums(done, error is not None)
            done = finished == self.number
            if failed:
                self._raise(error, what)
        if error is not None:
            raise error
        return done

    def _raise(self, error: BaseException | None, what: str) -> None:
        said = None if error is None else (_kind(error), f"{type(error).__name__}: {error}")
        everyone = self.gathered(said)
        if error is None:
            rank, (kind, message) = next((i, each) for i, each in enumerate(everyone) if each)
            raise kind(f"{what} failed in rank {rank}: {message}")


def _kind(error: BaseException) -> type[Exception]:
    """What the other processes raise: an error of ours as it is, else the nearest plain one."""
    own = type(error).__module__.partition(".")[0] == "lowrank"
    if isinstance(error, ValueError):
        return type(error) if own else ValueError
    return RuntimeError


def is_sharded(tensor: Tensor) -> bool:
    """Is ``tensor`` a DTensor, of which each process holds a part?"""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor in full, which every process must ask for; any other as it is."""
    return cast(Tensor, tensor.detach().full_tensor()) if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor, sharing its memory; any other as it is."""
    return cast(Tensor, tensor.detach().to_local()) if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def spread_as(tensor: Tensor, values: Tensor) -> Tensor:
    """``values``, which every process has in full, sharded as ``tensor`` is, if it is.

    The dtype is that of ``values``.
    """
    if not is_sharded(tensor) or is_sharded(values):
        return values
    from torch.distributed.tensor import distribute_tensor

    like: Any = tensor
    return distribute_tensor(values.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Copies ``values``, which every process has in full, into ``tensor``, which may be sharded."""
    part(tensor).copy_(part(spread_as(tensor, values)))


def shards(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` that FSDP2 gathers for their calls, outermost first."""
    return [
        module
        for module in model.modules()
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
    ]


def in_parts(model: nn.Module) -> bool:
    """Does no process hold all of ``model``?"""
    return bool(shards(model)) or any(map(is_sharded, model.parameters()))
