"""The gradients of one optimizer step, from one batch or several, and what may be wrong with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.batches import Loss, count_terms, in_float16, model_device, scalar_loss, to_device
from lowrank.notices import once
from lowrank.train.placement import placed
from lowrank.train.reach import reasons
from lowrank.train.single import SingleProcess
from lowrank.train.terms import TermCounter

NO_TERMS, OVERFLOW = "no labels", "overflow"  # why a step leaves the parameters as they are


class NonFiniteLoss(ValueError):
    """The loss was NaN or infinite. Step and batch are named, and nothing was updated with it."""


class NonFiniteGradient(ValueError):
    """The loss was finite and its gradient was not. The step is named, and nothing was updated with it."""


@dataclass(frozen=True)
class Outcome:
    """What a step's batches gave.

    loss: mean over the terms of all; NaN where there were none.
    norm: of its gradient, before clipping.
    skipped: why the gradient is not to be used; empty where it is.
    """

    loss: float
    norm: float
    skipped: str = ""

    def read(self) -> Outcome:
        """As `late.Unread` has it."""
        return self


@dataclass
class Tally:
    """What a step's batches gave. ``unit`` is the count that the gradients are in terms of."""

    places: list[int] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)
    unit: float = 1.0
    used: set[nn.Parameter] = field(default_factory=set)  # sharded ones that the losses depend on

    @property
    def last(self) -> float | None:
        return self.counts[-1] if self.counts else None

    def add(self, place: int, loss: Tensor, count: float) -> None:
        self.places.append(place)
        self.losses.append(loss)
        self.counts.append(count)

    def weighted(self, values: Sequence[float], step: int) -> float:
        """The sum of the losses' ``values``, each times its count. Raises NonFiniteLoss where one is not
        finite."""
        for at, value in zip(self.places, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLoss(f"the loss is {value} at step {step}, in batch {at} of its epoch")
        return sum(value * count for value, count in zip(values, self.counts, strict=True))

    def mean(self, values: Sequence[float], step: int) -> float:
        return self.weighted(values, step) / sum(self.counts)


@dataclass(frozen=True)
class Gradients:
    """Called with a step's batches, leaves in each parameter's ``.grad`` the gradient of their mean loss,
    clipped.

    A batch counts by the number of terms that its own mean is over, so that the result is the gradient of one
    large batch even where batches differ in size: by ``weight(batch)``, or, where ``weight`` is None, by what
    `TermCounter` sees, or else by `count_terms`. A batch that counts zero is left out, whatever its loss.

    ``scaler`` scales the loss, so that small gradients do not vanish in float16, where it is enabled.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    weight: Callable[[Any], float] | None
    clip: float | None
    autocast: torch.dtype | None
    scaler: torch.amp.GradScaler
    parallel: SingleProcess

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def __call__(self, batches: Sequence[Any], step: int, place: int) -> Outcome:
        """``place`` is the first batch's in its epoch, for messages."""
        tally = self.summed(batches, place)
        counts = tally.counts
        if not counts:
            return Outcome(math.nan, 0.0, NO_TERMS)
        scaled = self.scaler.is_enabled() and any(p.grad is not None for p in self.parameters)
        if scaled:
            self.scaler.unscale_(self.optimizer)
        norm = self.norm()
        losses = torch.stack(tally.losses)
        *values, size = torch.cat([losses, norm.to(losses.device).reshape(1)]).tolist()

        if not all(map(math.isfinite, values)) and self._counted_nothing(batches):
            if scaled:
                self.scaler.update(self.scaler.get_scale())  # which is not to blame
            return Outcome(math.nan, 0.0, NO_TERMS)
        mean = tally.mean(values, step)
        if not math.isfinite(size):
            if scaled and self.scaler.get_scale() > 1:
                self.scaler.update()
                return Outcome(mean, size, OVERFLOW)
            raise NonFiniteGradient(
                f"the gradient's norm is {size} at step {step}, though the loss is {values}"
            )
        self.clipped(norm)
        if scaled:
            self.scaler.update()
        return Outcome(mean, size)

    def summed(self, batches: Sequence[Any], place: int) -> Tally:
        """Leaves the gradient of the mean loss, not clipped, still scaled by ``scaler``."""
        tally = Tally()
        for at, batch in enumerate(batches, start=place):
            last = at == place + len(batches) - 1
            with self.parallel.accumulating(self.model, last=last), placed(self.model, batch, at):
                loss, count = self._backward(batch, watch=len(batches) > 1, before=tally.last)
            if loss is not None:
                tally.add(at, loss, count)
        if tally.counts:
            self._multiply(tally.counts[-1] / sum(tally.counts))
        return tally

    def norm(self) -> Tensor:
        """Of the gradient of all parameters, on the device."""
        return nn.utils.get_total_norm([at_least_fp32(p.grad) for p in self.parameters if p.grad is not None])

    def clipped(self, norm: Tensor) -> None:
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)

    def _backward(self, batch: Any, *, watch: bool, before: float | None) -> tuple[Tensor | None, float]:
        """The batch's loss and what it counts; no loss where it counts nothing.

        Gradients are summed in units of the count of the batch ``before``, so that no factor passes through a
        half-precision backward. A single batch (not ``watch``) needs no count.
        """
        count: float | None = None if self.weight is None else weighed(self.weight, batch)
        if count == 0:
            return None, 0.0
        loss, seen = self.forward(batch, watch=watch and count is None)
        if count is None:
            count = 1.0 if not watch else float(count_terms(self.model, batch) if seen is None else seen)
        if count == 0:
            return None, 0.0
        if before is not None:
            self._multiply(before / count)
        self.backward(loss)
        return at_least_fp32(loss.detach()), count

    def backward(self, loss: Tensor) -> None:
        self.check_depends(loss)
        self.scaler.scale(loss).backward()

    def check_depends(self, loss: Tensor) -> None:
        """Raises ValueError where no parameter can get a gradient from ``loss``."""
        if not loss.requires_grad:
            why = reasons(self.model, self.parameters) or ["does the model use what is to train?"]
            raise ValueError(f"the loss depends on nothing that requires grad: {'; '.join(why)}")

    def forward(self, batch: Any, *, watch: bool) -> tuple[Tensor, Tensor | None]:
        """The loss, and the number of terms that were seen in it, on the device."""
        device = model_device(self.model)
        counter = TermCounter()
        with (
            counter if watch else nullcontext(),
            torch.autocast(device.type, self.autocast, enabled=self.autocast is not None),
        ):
            loss = scalar_loss(self.loss, self.model, to_device(batch, device))
        if counter.by_hand:
            once(
                "the loss averages by itself what F.cross_entropy gives (reduction='none' or 'sum'), so each "
                "batch counts by its labels beside the others of a step; if it is a mean over something "
                "else, such as examples, pass weight=, as lambda batch: len(batch['labels'])"
            )
        return loss, counter.total()

    @torch.no_grad()
    def _counted_nothing(self, batches: Sequence[Any]) -> bool:
        """Has a single batch, which needed no count, no term at all? Asked where its loss is not finite."""
        if len(batches) > 1 or self.weight is not None:
            return False
        seen = self.forward(batches[0], watch=True)[1]
        return float(count_terms(self.model, batches[0]) if seen is None else seen) == 0

    def _multiply(self, factor: float) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if factor != 1 and gradients:
            torch._foreach_mul_(gradients, factor)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """In fp32 at least: a norm in bf16 has two to three digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def weighed(weight: Callable[[Any], float], batch: Any) -> float:
    """``weight(batch)``. Raises ValueError where that is no count."""
    count = float(weight(batch))
    if not 0 <= count < math.inf:
        raise ValueError(f"weight(batch): expected a finite number, zero or more, got {count}")
    return count


def needs_scaling(model: nn.Module, autocast: torch.dtype | None) -> bool:
    """Is anything computed in float16, by ``model`` itself or under ``autocast``?"""
    return autocast is torch.float16 or in_float16(model)
