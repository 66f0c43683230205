"""Gradients whose loss and norm are not waited for: what they are is read a step later.

A device such as a GPU computes while the process goes on. Whether all was finite is decided on the device, by
a flag that the optimizer reads there and skips by, as torch's fused ones can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank.batches import count_terms
from lowrank.train.placement import placed
from lowrank.train.step import NO_TERMS, Gradients, NonFiniteGradient, Outcome, Tally, at_least_fp32


@dataclass(frozen=True)
class Unread:
    """A step whose numbers are on their way. ``skip`` is 1 where the optimizer must leave all as it is."""

    skip: Tensor
    tally: Tally
    numbers: Tensor  # the losses, the norm, the terms, on the CPU once they are there
    arrived: torch.cuda.Event | None
    step: int

    def read(self) -> Outcome:
        """Waits for the numbers. Raises as `Gradients` does."""
        if self.arrived is not None:
            self.arrived.synchronize()
        *values, size, terms = self.numbers.tolist()
        if terms == 0 and not all(map(math.isfinite, values)):
            return Outcome(math.nan, 0.0, NO_TERMS)
        mean = self.tally.mean(values, self.step)
        if not math.isfinite(size):
            raise NonFiniteGradient(
                f"the gradient's norm is {size} at step {self.step}, though the loss is {values}"
            )
        return Outcome(mean, size)


class Late:
    """Called as `Gradients`, gives what is to be read later.

    Once a loss or a gradient was not finite every later step is skipped too, so that nothing is updated until
    that is read. A batch without a term is skipped alone.
    """

    def __init__(self, gradients: Gradients) -> None:
        self.gradients = gradients
        self._failed: Tensor | None = None

    def __call__(self, batches: Sequence[Any], step: int, place: int) -> Unread | Outcome:
        tally, terms = self._summed(batches, place)
        if not tally.counts:
            return Outcome(math.nan, 0.0, NO_TERMS)
        norm = self.gradients.norm()
        losses = torch.stack(tally.losses)
        numbers = torch.cat([losses, norm.to(losses).reshape(1), terms.to(losses).reshape(1)])
        finite = numbers[:-1].isfinite().all()
        failed = ~finite & ~((numbers[-1] == 0) & ~losses.isfinite().all())
        self._failed = failed if self._failed is None else self._failed | failed
        self.gradients.clipped(norm)
        arrived = None
        if numbers.is_cuda:
            stream, arrived = torch.cuda.current_stream(numbers.device), torch.cuda.Event()
            numbers = numbers.to("cpu", non_blocking=True)
            arrived.record(stream)
        return Unread((self._failed | ~finite).float(), tally, numbers, arrived, step)

    def _summed(self, batches: Sequence[Any], place: int) -> tuple[Tally, Tensor]:
        """A single batch is not counted before its backward, since that would wait for the device."""
        gradients = self.gradients
        if len(batches) > 1 or gradients.weight is not None:
            return gradients.summed(batches, place), torch.ones(())
        (batch,) = batches
        with placed(gradients.model, batch, place):
            loss, seen = gradients.forward(batch, watch=True)
            gradients.backward(loss)
        if seen is None:  # a tensor that is filled on the device, not copied to it
            seen = torch.full((), float(count_terms(gradients.model, batch)), device=loss.device)
        return Tally([place], [at_least_fp32(loss.detach())], [1.0]), seen


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Does it read a flag on the device, by which it leaves parameters and state as they are?"""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@contextmanager
def skipping(optimizer: Any, skip: Tensor) -> Iterator[None]:
    """Inside, ``optimizer.step()`` does nothing where ``skip`` is 1, as `torch.amp.GradScaler` has it."""
    optimizer.grad_scale, optimizer.found_inf = None, skip
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf
