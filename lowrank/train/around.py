"""The loss of some batches around the parameters' values: gradients there and a step away.

It knows parameters, not what they are part of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.processes import is_sharded, part
from lowrank.train.generators import host_generators, set_host_generators
from lowrank.train.scope import evaluating, forked_generators
from lowrank.train.step import NO_TERMS, OVERFLOW, Gradients, NonFiniteGradient, NonFiniteLoss

GIVE = "give lr= a number instead"


@dataclass(frozen=True)
class Around:
    """What moves, how far in a step of length 1, and from where. Gradients are of the mean loss over
    ``batches`` and those of other processes, in fp32; of what is sharded they are a part."""

    gradients: Gradients
    batches: Sequence[Any]
    moves: Mapping[nn.Parameter, float]
    values: Sequence[Tensor]

    def step(self, signs: Sequence[Tensor], distance: float) -> list[Tensor]:
        """Puts each parameter so far against its signs, and gives by how much it has moved."""
        with torch.no_grad():
            for (p, move), value, sign in zip(self.moves.items(), self.values, signs, strict=True):
                part(p).copy_(value).add_(sign.to(p.dtype), alpha=-distance * move)
            # In a half precision a weight moves less far, or not at all.
            return [part(p).float() - value.float() for p, value in zip(self.moves, self.values, strict=True)]

    def gradient(self) -> tuple[float, list[Tensor]]:
        """The loss and its gradient where the parameters are."""
        numbers = host_generators()
        while True:
            _clear(self.gradients)
            set_host_generators(numbers)
            try:
                with forked_generators(seed=0), torch.enable_grad():
                    outcome = self.gradients(self.batches, 1, 1)
            except (NonFiniteLoss, NonFiniteGradient) as error:
                raise type(error)(f"no learning rate can be measured: {error}") from error
            if outcome.skipped == NO_TERMS:
                raise ValueError(
                    f"no learning rate can be measured: the first {len(self.batches)} batches have no label "
                    f"that the loss counts; {GIVE}"
                )
            if outcome.skipped != OVERFLOW:
                break
        return outcome.loss, [
            torch.zeros_like(part(p)).float() if p.grad is None else part(p.grad).float() for p in self.moves
        ]

    def inner(self, ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
        """The inner product over parameters and processes; the same in all."""
        parallel = self.gradients.parallel
        terms = [float((a * b).sum()) for a, b in zip(ones, others, strict=True)]
        whole = sum(term for p, term in zip(self.moves, terms, strict=True) if not is_sharded(p))
        parts = sum(term for p, term in zip(self.moves, terms, strict=True) if is_sharded(p))
        return parallel.sum(parts + (whole if parallel.rank == 0 else 0.0))


@contextmanager
def around(
    gradients: Gradients, batches: Sequence[Any], moves: Mapping[nn.Parameter, float]
) -> Iterator[Around]:
    """Values, gradients and random numbers are afterwards what they were."""
    values = [part(p).detach().clone() for p in moves]
    before = [(p, p.grad) for p in _reached(gradients)]
    numbers = host_generators()
    try:
        with evaluating(gradients.model):
            for module in gradients.model.modules():
                # transformers' layers recompute in train mode only, and memory may not do without.
                module.training = bool(getattr(module, "gradient_checkpointing", False))
            yield Around(gradients, batches, moves, values)
    finally:
        with torch.no_grad():
            for p, value in zip(moves, values, strict=True):
                part(p).copy_(value)
        for p, gradient in before:
            p.grad = gradient
        set_host_generators(numbers)


def _clear(gradients: Gradients) -> None:
    for p in _reached(gradients):
        p.grad = None


def _reached(gradients: Gradients) -> list[nn.Parameter]:
    """What may get a gradient, each once."""
    return list(dict.fromkeys(chain(gradients.model.parameters(), gradients.parameters)))
