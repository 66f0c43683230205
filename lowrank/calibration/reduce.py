"""Several processes calibrate as one: their sums are added, and what fails in one of them fails in all.

Without `torch.distributed`, or in a group of one, nothing here does anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Processes:
    """All processes of the default group; tensors are exchanged on ``device``, by gloo on the CPU."""

    def __init__(self, device: torch.device) -> None:
        group = torch.distributed
        several = group.is_available() and group.is_initialized()
        self.number = group.get_world_size() if several else 1
        self.device = torch.device("cpu") if several and group.get_backend() == "gloo" else device

    def added(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in the tensor's dtype and where it is."""
        if self.number == 1:
            return tensor
        moved = tensor.to(self.device, copy=True)
        torch.distributed.all_reduce(moved)
        return moved.to(tensor.device)

    def gathered(self, value: Any) -> list[Any]:
        """What each process says, by rank."""
        if self.number == 1:
            return [value]
        everyone: list[Any] = [None] * self.number
        torch.distributed.all_gather_object(everyone, value)
        return everyone

    def all_done(self, done: bool, error: Exception | None = None) -> bool:
        """Is every process done? Each asks before each of its batches, and goes on asking when it is done.

        Raises ``error``; where another process has one, its message: as ValueError if that was one, else as
        RuntimeError.
        """
        if self.number > 1:
            counts = self.added(torch.tensor([int(done), int(error is not None)]))
            done = int(counts[0]) == self.number
            if counts[1]:
                self._raise(error)
        if error is not None:
            raise error
        return done

    def _raise(self, error: Exception | None) -> None:
        said = None if error is None else (isinstance(error, ValueError), f"{type(error).__name__}: {error}")
        everyone = self.gathered(said)
        if error is None:
            rank, (bad_input, message) = next((i, each) for i, each in enumerate(everyone) if each)
            raise (ValueError if bad_input else RuntimeError)(f"calibration failed in rank {rank}: {message}")
