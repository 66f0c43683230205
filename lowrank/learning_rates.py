"""Learning rates for adapters: one that is measured and kept in the plan, and two that differ by factor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from lowrank.adapters import adapter_parameters, one_name, plan_of
from lowrank.batches import Loss
from lowrank.choosing import use_adapters
from lowrank.layers.adapter import Adapter
from lowrank.train.rate import STEPS, measured_rate, turning_steps


def plan_learning_rate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    name: str | None = None,
    *,
    steps: int = STEPS,
) -> float:
    """A peak learning rate for the adapter ``name``, measured on the first batches. The adapter's plan keeps
    it as ``plan.learning_rate``.

    It is what ``fit(lr="auto")`` takes for these parameters, which do not include modules trained in full, in
    a run of so many steps. The adapter acts alone meanwhile; nothing is trained, and every value, gradient
    and random number is afterwards what it was. Measure before training: a trained adapter gives another
    rate.

    Args:
        batches: a DataLoader or a list; the first six are read, several times.
        loss: ``loss(model, batch) -> scalar``; by default the ``.loss`` of the model's output.
        name: may be left out where there is one adapter.
        steps: of the optimizer, in the run that the rate is for. A longer run wants a lower rate.

    Raises:
        ValueError: ``steps`` below 1, no adapter of that name, one that is frozen, or nothing can be
            measured: see `lowrank.train.rate.turning_steps`.
    """
    if not steps >= 1:
        raise ValueError(f"steps: expected a positive number, got {steps}")
    name = one_name(model, name)
    moved = [p for p in adapter_parameters(model, name) if p.requires_grad]
    if not moved:
        raise ValueError(f"the adapter {name!r} is frozen: set requires_grad of what it trains first")
    with use_adapters(model, name):
        rate = measured_rate(turning_steps(model, batches, loss, parameters=moved), steps)
    plan_of(model, name).learning_rate = rate
    return rate


def lora_plus(
    model: nn.Module, lr: float | None = None, *, ratio: float = 16.0, name: str | None = None
) -> list[dict[str, Any]]:
    """What requires grad in ``model`` in two groups: the factors B with ``ratio · lr``, all else with ``lr``.

    This is LoRA+ (Hayou et al. 2024, arXiv:2402.12354). Pass it as ``fit(parameters=...)``, or to an
    optimizer. Without ``lr`` the groups take that of `fit`, also ``lr="auto"``, which is then measured along
    the step that both take; an optimizer of torch would not heed their ``lr_ratio``. With a
    ``name`` they hold what that adapter trains, and nothing else. Raises ValueError where no B is to be
    trained, or there is no adapter of that name.
    """
    for option, value in (("lr", lr), ("ratio", ratio)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{option}: expected a positive number, got {value}")
    faster = {
        module.B for module in model.modules() if isinstance(module, Adapter) and module.B.requires_grad
    }
    trained = model.parameters() if name is None else adapter_parameters(model, name, train=True)
    learning = [p for p in trained if p.requires_grad]
    others = [p for p in learning if p not in faster]
    ordered = [p for p in learning if p in faster]
    if not ordered:
        raise ValueError(
            "the model has no factor B that requires grad: wrap it with wrap_model first"
            if name is None
            else f"the adapter {name!r} has no factor B that requires grad"
        )
    groups: list[dict[str, Any]] = [{"params": others}, {"params": ordered, "lr_ratio": ratio}]
    if lr is not None:
        groups = [{"params": others, "lr": lr}, {"params": ordered, "lr": lr * ratio}]
    return [group for group in groups if group["params"]]
