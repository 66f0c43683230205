"""The gradients of one optimizer step over all processes: those of one large batch.

Copies of a model (DDP) add their gradients once a step, after accumulation: each in terms of what its own
batches counted, so that a process may have fewer batches than another, or none. A sharded model (FSDP2) adds
them in its own backward, for which every process must call it equally often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank.batches import count_terms
from lowrank.processes import is_sharded, part, shards, whole
from lowrank.train.idle import Idle
from lowrank.train.parallel import Together
from lowrank.train.placement import placed
from lowrank.train.single import SingleProcess
from lowrank.train.step import (
    NO_TERMS,
    OVERFLOW,
    Gradients,
    NonFiniteGradient,
    Outcome,
    Tally,
    at_least_fp32,
    weighed,
)


class TogetherGradients(Gradients):
    """`Gradients` of a step in which all processes take part. The mean is over the terms of all batches."""

    def __call__(self, batches: Sequence[Any], step: int, place: int) -> Outcome:
        together = cast(Together, self.parallel)
        tally, error, weighted = Tally(), None, 0.0
        try:
            tally = (self._sharded if together.sharded else self._copied)(batches, place)
            values = torch.stack(tally.losses).tolist() if tally.losses else []
            weighted = tally.weighted(values, step)
        except Exception as raised:
            if together.told:
                raise
            error = raised
        total, weighted = together.exchange(sum(tally.counts), weighted, error=error).sum(0).tolist()[:2]
        if not total:
            return Outcome(math.nan, 0.0, NO_TERMS)
        self._add_up(tally, total, together)
        norm = self._unscaled_norm()
        mean = weighted / total
        if not math.isfinite(norm):
            if self.scaler.is_enabled() and self.scaler.get_scale() > 1:
                self.scaler.update()
                return Outcome(mean, norm, OVERFLOW)
            raise NonFiniteGradient(
                f"the gradient's norm is {norm} at step {step}, though the loss is {mean}"
            )
        if self.clip is not None and norm > self.clip:
            self._scale(self.clip / (norm + 1e-6))
        if self.scaler.is_enabled():
            self.scaler.update()
        return Outcome(mean, norm)

    # -- this process's part --------------------------------------------------------------------------------

    def _copied(self, batches: Sequence[Any], place: int) -> Tally:
        tally = Tally()
        for at, batch in enumerate(batches, start=place):
            with placed(self.model, batch, at):
                loss, count = self._backward(batch, watch=True, before=tally.last)
            if loss is not None:
                tally.add(at, loss, count)
        tally.unit = tally.last or 1.0
        return tally

    def _sharded(self, batches: Sequence[Any], place: int) -> Tally:
        """Every process calls the model as often as the one with the most batches: on its last batch again,
        which then counts nothing. Losses are weighed before backward, in terms of one count for all."""
        together = cast(Together, self.parallel)
        held = self.__dict__.setdefault("_spare", [])
        held[:] = batches[-1:] or held
        error = (
            None if held else ValueError("this process has no batch yet, so it cannot take part in a step")
        )
        most = int(together.exchange(len(batches), error=error)[:, 0].max())
        roots = shards(self.model)
        idle = Idle(self.model, self.parameters)
        tally = Tally()
        for i in range(most):
            for module in roots:
                module.set_requires_gradient_sync(i == most - 1, recurse=False)  # type: ignore[operator]
            batch = batches[i] if i < len(batches) else held[0]
            with together.sharded_forward(), idle, placed(self.model, batch, place + i):
                loss, count = self._counted(batch)
            count = count if i < len(batches) else 0.0
            largest = float(together.exchange(count)[:, 0].max())  # also that all have come this far
            if i == 0:
                tally.unit = largest or 1.0
            value: Tensor | None = None
            if count:
                tally.add(place + i, at_least_fp32(loss.detach()), count)
                tally.used |= idle.used(loss)
                value = loss if count == tally.unit else loss * (count / tally.unit)
            value = idle.tied(value)
            with together.sharded_backward():
                if value is not None:
                    self.scaler.scale(value).backward()
        return tally

    def _counted(self, batch: Any) -> tuple[Tensor, float]:
        """The loss, and the terms that it is a mean over."""
        count = None if self.weight is None else weighed(self.weight, batch)
        loss, seen = self.forward(batch, watch=count is None)
        if count is None:
            count = float(count_terms(self.model, batch) if seen is None else seen)
        self.check_depends(loss)
        return loss, count

    # -- that of all ----------------------------------------------------------------------------------------

    def _add_up(self, tally: Tally, total: float, together: Together) -> None:
        """Divides by ``total``, the terms of all, and adds what the other processes have.

        FSDP2 has averaged what is sharded; a parameter that no process has used gets no gradient.
        """
        factor, processes, parameters = tally.unit / total, together.processes, self.parameters
        mine = [p in tally.used if is_sharded(p) else p.grad is not None for p in parameters]
        present = processes.added(torch.tensor(mine, dtype=torch.float32)).tolist()
        used = []
        for p, number in zip(parameters, present, strict=True):
            if is_sharded(p):
                if not number:
                    p.grad = None
                elif p.grad is not None:
                    part(p.grad).mul_(factor * together.size)
            elif number:
                used.append(p)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in used:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
        for gradients in by_dtype.values():
            flat = torch.cat([gradient.flatten() for gradient in gradients]).mul_(factor)
            summed = processes.added(flat).split([gradient.numel() for gradient in gradients])
            for gradient, values in zip(gradients, summed, strict=True):
                gradient.copy_(values.view_as(gradient))

    def _unscaled_norm(self) -> float:
        """Of the whole gradient, after the scale of the loss is taken out of it."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        size = 0.0
        for sharded in (False, True):
            gradients = [
                at_least_fp32(p.grad)
                for p in self.parameters
                if p.grad is not None and is_sharded(p) is sharded
            ]
            if gradients:
                size = math.hypot(size, float(whole(nn.utils.get_total_norm(gradients))))
        return size

    def _scale(self, factor: float) -> None:
        torch._foreach_mul_([part(p.grad) for p in self.parameters if p.grad is not None], factor)


def gradients_of(parallel: SingleProcess) -> type[Gradients]:
    """How the gradients are made, in one process or several."""
    return Gradients if parallel.size == 1 else TogetherGradients
