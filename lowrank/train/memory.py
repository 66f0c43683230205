"""The memory that a training step takes, told before one is run.

The step runs on a stand-in of the model, see `stand_in`. It knows no family of models and no adapter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from lowrank.batches import Loss, output_loss
from lowrank.notices import show
from lowrank.train.memory_helps import lighter, with_helps
from lowrank.train.memory_table import MemoryReport
from lowrank.train.stand_in import Optimizers, StandIn, plain

OPTIMIZERS: dict[str, Optimizers] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
}


def step_memory(
    model: nn.Module,
    batch: Any,
    loss: Loss | None = None,
    *,
    autocast: torch.dtype | None = None,
    optimizer: str | Optimizers = "adamw",
    accumulate: bool = False,
    available: int | None = None,
    title: str = "a training step",
) -> MemoryReport:
    """What a step of training ``model`` on ``batch`` holds: forward, backward, and the optimizer's update.

    Nothing is computed and ``model`` is left as it is. Counted is what PyTorch's allocator is asked for; what
    a kernel needs inside itself and what the allocator keeps in reserve are not. The result is that of the
    CPU's kernels for a model on the CPU, and of CUDA's on CUDA, where two cases were measured.

    Args:
        batch, loss, autocast: as for `fit`.
        optimizer: "adamw", "adam", "sgd", or a function from parameters to an optimizer.
        accumulate: is the batch one of several of a step? Then the gradients of those before it are held.
        available: the bytes that it must fit into; by default what the device has free.

    Raises:
        ValueError: nothing is to be trained, the optimizer is not known, or the step cannot be told from
            shapes alone, as where a router decides about sizes, or of a tensor of an unknown class.
    """
    factory = optimizer_factory(optimizer)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing requires grad, so there is nothing to train: wrap the model first")

    def measured(batch: Any, accumulate: bool, change: Callable[[nn.Module], object] | None) -> MemoryReport:
        stand_in = StandIn(model)
        if change is not None:
            change(stand_in.model)
        return stand_in.step(
            batch,
            loss or output_loss,
            autocast=autocast,
            optimizer=factory,
            accumulate=accumulate,
            available=available,
            title=title,
        )

    batch = plain(batch)
    tries = (
        (what, partial(measured, smaller, accumulate or smaller is not batch, change))
        for what, smaller, change in lighter(model, batch)
    )
    return with_helps(measured(batch, accumulate, None), tries)


def told(
    model: nn.Module,
    batch: Any,
    loss: Loss | None,
    autocast: torch.dtype | None,
    optimizer: torch.optim.Optimizer,
    accumulate: bool,
) -> MemoryReport | None:
    """Shows `step_memory` for an optimizer of this class and its groups, or why there is none."""
    cls: Any = type(optimizer)

    def made(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return cls(list(parameters), **{k: v for k, v in optimizer.defaults.items() if k in _arguments(cls)})

    try:
        report = step_memory(model, batch, loss, autocast=autocast, optimizer=made, accumulate=accumulate)
    except (ValueError, TypeError) as error:
        show(f"no report of memory: {error}")
        return None
    show(str(report))
    return report


def _arguments(cls: type) -> set[str]:
    return set(inspect.signature(cls).parameters)


def optimizer_factory(optimizer: str | Optimizers) -> Optimizers:
    """What makes the optimizer; raises ValueError for a name that is not known."""
    if callable(optimizer):
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer: expected one of {sorted(OPTIMIZERS)}, or a function from parameters to an "
            f"optimizer, got {optimizer!r}"
        )
    return OPTIMIZERS[optimizer]
