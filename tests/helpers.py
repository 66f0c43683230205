"""What several test files need: small wrapped models, outputs, the frozen base, a change, row numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from lowrank import Policy, presets
from tests import zoo


def wrapped(family: str = "llama", policy: Policy | None = None, **options: Any) -> nn.Module:
    """A small model of ``family`` with an adapter, LoRA of rank 4 unless a policy says otherwise."""
    return lowrank.wrap_model(zoo.build(family), policy or presets.lora(rank=4), progress=False, **options)


def logits(model: nn.Module, batch: Any) -> Tensor:
    """What ``model`` makes of ``batch``, without grad: its logits, whatever the output calls them.

    A mapping is passed by keyword, anything else as the one argument; a tensor that comes back is the logits.
    """
    with torch.no_grad():
        output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output.logits_per_image


def frozen_logits(model: nn.Module, batch: Any) -> Tensor:
    """The logits of ``model`` with every parameter frozen; the flags are as before afterwards.

    This is what a wrapped model equals bit for bit, and what comes back when it is unwrapped. Where a weight
    requires grad PyTorch may pick another kernel with another rounding, also under no_grad, which depends on
    the processor: no test compares bits with a base that is not frozen.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        return logits(model, batch)
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def numbers(rows: tuple[int, ...]) -> list[int]:
    """The rows one by one: of ``(start, stop, size, stride)`` the first ``size`` of every ``stride``."""
    start, stop, *repeated = rows
    size, stride = repeated or (stop - start, stop - start)
    return [row for row in range(start, stop) if (row - start) % stride < size]


def perturb(model: nn.Module, size: float = 0.1) -> nn.Module:
    """Moves everything that trains, as training would, each tensor its own way; the same each time.

    In a wrapped model these are the adapters and the modules trained in full. Each entry moves by a normal
    number of standard deviation ``size``.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert learning, "nothing of the model trains, so nothing would move"
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in learning:
            parameter.add_(size * torch.randn(parameter.shape, generator=draw).to(parameter))
    return model
