"""A learning rate that is measured, not swept: how far a step of sign descent can go before the loss turns.

It knows parameters, not what they are part of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.batches import Loss, model_device, output_loss
from lowrank.train.around import GIVE, Around, around
from lowrank.train.data import Cursor
from lowrank.train.groups import Groups
from lowrank.train.optim import make_optimizer, parameter_groups
from lowrank.train.parallel import parallel_of
from lowrank.train.step import Gradients, needs_scaling
from lowrank.train.together import gradients_of

SHARE, STEPS, HIGHEST = 0.22, 250, 3e-3  # fitted on 18 methods and one task: docs/choosing.md
BATCHES = 6  # how many a measurement takes
NEAREST, FARTHEST = 1e-3, 1.0  # no step along the sign is longer than four of the latter
TRIAL = 1e-4  # a step that gives a gradient to what has none at first


class Turns(NamedTuple):
    """Two lengths of a step after which the loss stops falling.

    curved: along the sign of the first gradient, by the curvature there.
    walked: where everything moves, also what has no gradient at first, by the loss on the way.
    """

    curved: float
    walked: float


def measured_rate(turns: Turns, steps: int = STEPS) -> float:
    """The peak learning rate of a run of so many optimizer steps: a share of a length, up to a highest.

    The length is t with ``1/t = 1/curved + 1/walked``; the share falls with the square root of the steps.
    """
    share = min(1.0, SHARE * math.sqrt(STEPS / steps))
    return min(share / (1 / turns.curved + 1 / turns.walked), HIGHEST)


def turning_steps(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    parameters: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None = None,
    count: int = BATCHES,
    distance: float = NEAREST,
) -> Turns:
    """The lengths t at which ``loss(θ − t·d)`` stops falling, with ``d = ratio · sign(g)``.

    g is the gradient of the mean loss over the first ``count`` batches. ``curved`` is ``gᵀd / dᵀHd``, where
    H·d is the difference of two such gradients, a ``distance`` apart along d, divided by it. A new head makes
    the curvature at the start a matter of chance, so the distance grows until the loss bends upward over it,
    and until t is at most four times as long. For ``walked``, an entry whose gradient is exactly zero, as
    that of A beside B = 0, has the sign that it gets by a very short step: an optimizer moves both from its
    second step on. An early step of Adam has the length of its learning rate along d, so that t bounds the
    rate from above. The ratio is 1 but in groups with an ``lr_ratio``, which count relative to their mean:
    see `moves`.

    Modules are in eval mode meanwhile, except those that compute activations again in backward. Every value,
    gradient and random number is afterwards what it was, and the batches begin where they did. In several
    processes every one must call this; g is over the batches of all, and t is the same in all.

    Args:
        batches: what can be gone over again: a DataLoader, a list.
        parameters: what the step moves; everything that requires grad by default. They may be groups, of
            which those with an ``lr`` of their own stay where they are, as does what else requires grad.

    Raises:
        ValueError: no batch, a gradient of zero or one that is not finite, or a loss that bends upward over
            no distance: there is then no such length.
    """
    model, parallel = parallel_of(model)
    with parallel.guarded():
        groups = parameter_groups(model, parameters)
        optimizer = make_optimizer(model, groups, lr=1.0)
        scaler = torch.amp.GradScaler(model_device(model).type, enabled=needs_scaling(model, None))
        parallel.check_scaling(scaler.is_enabled())
        gradients = gradients_of(parallel)(
            model, optimizer, loss or output_loss, None, None, None, scaler, parallel
        )
        first = Cursor(Groups.plan(batches, 1, 1, 1)).first(count)
        return turning(gradients, first, moves(groups), distance)


def moves(groups: Iterable[Mapping[str, Any]]) -> dict[nn.Parameter, float]:
    """How far each parameter moves in a step of length 1: all but those of groups with an ``lr``.

    It is the group's ``lr_ratio`` over `mean_ratio`, so that a factor common to all ratios changes nothing.
    """
    groups = [group for group in groups if "lr" not in group]
    mean = mean_ratio(groups)
    return {p: group.get("lr_ratio", 1.0) / mean for group in groups for p in group["params"]}


def mean_ratio(groups: Iterable[Mapping[str, Any]]) -> float:
    """The geometric mean of ``lr_ratio`` over all numbers to train, without groups that have an ``lr``."""
    sizes = [
        (group.get("lr_ratio", 1.0), sum(p.numel() for p in group["params"]))
        for group in groups
        if "lr" not in group
    ]
    return math.exp(sum(n * math.log(ratio) for ratio, n in sizes) / max(1, sum(n for _, n in sizes)))


def turning(
    gradients: Gradients,
    batches: Sequence[Any],
    moves: Mapping[nn.Parameter, float],
    distance: float = NEAREST,
) -> Turns:
    """`turning_steps` for gradients as a run computes them, clipping apart, and those of its parameters that
    ``moves`` names."""
    with around(gradients, batches, moves) as here:
        loss, first = here.gradient()
        signs = [g.sign() for g in first]
        if not here.inner(first, signs) > 0:
            raise ValueError(
                f"no learning rate can be measured: the gradient of what trains is exactly zero; {GIVE}"
            )
        curved = _curved(here, first, signs, distance)
        here.step(signs, TRIAL)
        _, ahead = here.gradient()
        signs = [torch.where(g == 0, h, g).sign() for g, h in zip(first, ahead, strict=True)]
        return Turns(curved, _walked(here, loss, first, signs))


def _curved(here: Around, first: Sequence[Tensor], signs: Sequence[Tensor], distance: float) -> float:
    """Where the curvature along ``signs`` makes the loss turn."""
    while True:
        steps = here.step(signs, distance)
        slope = -here.inner(first, steps)
        if not slope > 0:
            raise ValueError(
                f"no learning rate can be measured: the precision of what trains does not resolve a step "
                f"of {distance}; {GIVE}"
            )
        _, second = here.gradient()
        bend = slope + here.inner(second, steps)
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


def _walked(here: Around, loss: float, first: Sequence[Tensor], signs: Sequence[Tensor]) -> float:
    """Where the loss turns on the way along ``signs``, by the cubic between the two distances around."""
    near, slope, distance = 0.0, math.nan, 2 * NEAREST
    while True:
        steps = here.step(signs, distance)
        if near == 0:
            slope = here.inner(first, steps) / distance
        far_loss, gradient = here.gradient()
        far = here.inner(gradient, steps) / distance
        if far >= 0 or far_loss >= loss or distance >= 4 * FARTHEST:
            return _lowest(near, loss, slope, distance, far_loss, far)
        near, loss, slope, distance = distance, far_loss, far, 3 * distance


def _lowest(a: float, loss_a: float, slope_a: float, b: float, loss_b: float, slope_b: float) -> float:
    """Between a and b the lowest place of the cubic with these values and slopes (Nocedal & Wright, 3.59)."""
    d = slope_a + slope_b - 3 * (loss_a - loss_b) / (a - b)
    root = math.sqrt(max(0.0, d * d - slope_a * slope_b))
    below = slope_b - slope_a + 2 * root
    return min(max(a, b - (b - a) * (slope_b + root - d) / below), b) if below else b
