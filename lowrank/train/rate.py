"""A learning rate that is measured, not swept: how far a step of sign descent can go before the loss turns.

It knows parameters, not what they are part of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.batches import Loss, model_device, output_loss
from lowrank.processes import is_sharded, part
from lowrank.train.data import Cursor
from lowrank.train.generators import host_generators, set_host_generators
from lowrank.train.groups import Groups
from lowrank.train.optim import make_optimizer
from lowrank.train.parallel import parallel_of
from lowrank.train.scope import evaluating, forked_generators
from lowrank.train.step import NO_TERMS, OVERFLOW, Gradients, NonFiniteGradient, NonFiniteLoss, needs_scaling
from lowrank.train.together import gradients_of

SHARE = 8e-3  # learning rate = SHARE · √(turning step): fitted on 17 methods and one task, docs/choosing.md
BATCHES = 6  # how many a measurement takes
FARTHEST = 1.0  # no step along the sign is longer than four of these
GIVE = "give lr= a number instead"


def measured_rate(turning: float) -> float:
    """The peak learning rate for a loss that turns after a sign step of length ``turning``."""
    return SHARE * math.sqrt(turning)


def turning_step(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    parameters: Sequence[nn.Parameter] | None = None,
    count: int = BATCHES,
    distance: float = 1e-3,
) -> float:
    """The length t at which ``loss(θ − t·sign(g))`` stops falling: ``‖g‖₁ / sᵀHs``.

    g is the gradient of the mean loss over the first ``count`` batches, s its sign, and H·s the difference of
    two such gradients, a ``distance`` apart along s, divided by it. A new head makes the curvature at the
    start a matter of chance, so the distance grows until the loss bends upward over it, and until t is at
    most four times as long. An early step of Adam has the length of its learning rate along s, so that t
    bounds the rate from above.

    Modules are in eval mode meanwhile, except those that compute activations again in backward. Every value,
    gradient and random number is afterwards what it was, and the batches begin where they did. In several
    processes every one must call this; g is over the batches of all, and t is the same in all.

    Args:
        batches: what can be gone over again: a DataLoader, a list.
        parameters: what the step moves; everything that requires grad by default. What else requires grad
            stays where it is.

    Raises:
        ValueError: no batch, a gradient of zero or one that is not finite, or a loss that bends upward over
            no distance: there is then no such length.
    """
    model, parallel = parallel_of(model)
    with parallel.guarded():
        optimizer = make_optimizer(model, parameters, lr=1.0)
        scaler = torch.amp.GradScaler(model_device(model).type, enabled=needs_scaling(model, None))
        parallel.check_scaling(scaler.is_enabled())
        gradients = gradients_of(parallel)(
            model, optimizer, loss or output_loss, None, None, None, scaler, parallel
        )
        first = Cursor(Groups.plan(batches, 1, 1, 1)).first(count)
        return turning(gradients, first, gradients.parameters, distance)


def turning(
    gradients: Gradients,
    batches: Sequence[Any],
    moved: Sequence[nn.Parameter],
    distance: float = 1e-3,
) -> float:
    """`turning_step` for gradients as a run computes them, clipping apart, and those of its parameters that
    are ``moved``."""
    with _untouched(gradients, moved) as values:
        first = _gradient(gradients, batches, moved)
        size = _summed(gradients, moved, [float(g.abs().sum()) for g in first])
        if not size > 0:
            raise ValueError(
                f"no learning rate can be measured: the gradient of what trains is exactly zero; {GIVE}"
            )
        while True:
            slope, bend = _bend(gradients, batches, moved, values, first, distance)
            if not slope > 0:
                raise ValueError(
                    f"no learning rate can be measured: the precision of what trains does not resolve a step "
                    f"of {distance}; {GIVE}"
                )
            if bend > 0 and math.isfinite(bend):
                turn = slope * distance / bend
                if turn <= 4 * distance or distance >= FARTHEST:
                    return turn
                distance = min(turn, 16 * distance)
            elif distance < FARTHEST:
                distance *= 4
            else:
                raise ValueError(
                    f"no learning rate can be measured: along the gradient's sign the loss does not bend "
                    f"upward, not even over {distance:.3g} (it bends by {bend / distance**2:.3g}); {GIVE}"
                )


def _bend(
    gradients: Gradients,
    batches: Sequence[Any],
    moved: Sequence[nn.Parameter],
    values: Sequence[Tensor],
    first: Sequence[Tensor],
    distance: float,
) -> tuple[float, float]:
    """How far the loss falls over a step of ``distance`` along the sign of the ``first`` gradient if its
    slope stays what it is; and twice by how much less it falls if the slope changes evenly."""
    with torch.no_grad():
        for p, value, gradient in zip(moved, values, first, strict=True):
            part(p).copy_(value).add_(gradient.sign().to(p.dtype), alpha=-distance)
        # In a half precision a weight moves less far, or not at all.
        steps = [part(p).float() - value.float() for p, value in zip(moved, values, strict=True)]
    second = _gradient(gradients, batches, moved)
    slope, bend = (
        _summed(gradients, moved, [float(each) for each in terms])
        for terms in (
            (-(g * step).sum() for g, step in zip(first, steps, strict=True)),
            (((b - a) * step).sum() for a, b, step in zip(first, second, steps, strict=True)),
        )
    )
    return slope, bend


def _gradient(gradients: Gradients, batches: Sequence[Any], moved: Sequence[nn.Parameter]) -> list[Tensor]:
    """Of the mean loss over ``batches`` and those of other processes, in fp32; of what is sharded a part."""
    numbers = host_generators()
    while True:
        _clear(gradients)
        set_host_generators(numbers)
        try:
            with forked_generators(seed=0), torch.enable_grad():
                outcome = gradients(batches, 1, 1)
        except (NonFiniteLoss, NonFiniteGradient) as error:
            raise type(error)(f"no learning rate can be measured: {error}") from error
        if outcome.skipped == NO_TERMS:
            raise ValueError(
                f"no learning rate can be measured: the first {len(batches)} batches have no label that the "
                f"loss counts; {GIVE}"
            )
        if outcome.skipped != OVERFLOW:
            break
    return [torch.zeros_like(part(p)).float() if p.grad is None else part(p.grad).float() for p in moved]


def _summed(gradients: Gradients, moved: Sequence[nn.Parameter], terms: Sequence[float]) -> float:
    """Over parameters and processes; the same in all."""
    parallel = gradients.parallel
    whole = sum(term for p, term in zip(moved, terms, strict=True) if not is_sharded(p))
    parts = sum(term for p, term in zip(moved, terms, strict=True) if is_sharded(p))
    return parallel.sum(parts + (whole if parallel.rank == 0 else 0.0))


def _clear(gradients: Gradients) -> None:
    for p in _reached(gradients):
        p.grad = None


def _reached(gradients: Gradients) -> list[nn.Parameter]:
    """What may get a gradient, each once."""
    return list(dict.fromkeys(chain(gradients.model.parameters(), gradients.parameters)))


@contextmanager
def _untouched(gradients: Gradients, moved: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Gives the values of ``moved``. They, gradients and random numbers are afterwards what they were."""
    values = [part(p).detach().clone() for p in moved]
    before = [(p, p.grad) for p in _reached(gradients)]
    numbers = host_generators()
    try:
        with evaluating(gradients.model):
            for module in gradients.model.modules():
                # transformers' layers recompute in train mode only, and memory may not do without.
                module.training = bool(getattr(module, "gradient_checkpointing", False))
            yield values
    finally:
        with torch.no_grad():
            for p, value in zip(moved, values, strict=True):
                part(p).copy_(value)
        for p, gradient in before:
            p.grad = gradient
        set_host_generators(numbers)
