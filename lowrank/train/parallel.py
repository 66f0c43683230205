"""What the processes of a run do together. Here there is one, and so nothing to do.

The loop asks this object instead of asking whether it is alone: who writes, when gradients are averaged, what
the sum over all processes is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


class SingleProcess:
    """One process, which is also the one that writes."""

    rank = 0
    size = 1

    @property
    def writes(self) -> bool:
        """Does this process show the bar, and write the log and what checkpoints share?"""
        return self.rank == 0

    def accumulating(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward of one batch; gradients are averaged in that of a step's last."""
        return nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise, over all processes."""
        return values

    def any(self, flag: bool) -> bool:
        """Is it true in any process?"""
        return flag

    def wait(self) -> None:
        """Until all processes are here."""
