"""What several test files need: a model's output, an adapter that has moved, the frozen base to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import lowrank


def logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """What ``model`` makes of ``batch``, without grad: its logits, whatever the output calls them."""
    with torch.no_grad():
        output = model(**batch)
    return output.logits if hasattr(output, "logits") else output.logits_per_image


def frozen_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The logits of ``model`` with every parameter frozen; the flags are as before afterwards.

    This is what a wrapped model equals bit for bit. Where a weight requires grad PyTorch may pick another kernel
    with another rounding, and which one depends on the processor: no test compares with an unfrozen base.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        return logits(model, batch)
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def perturb(model: nn.Module, size: float = 0.1) -> nn.Module:
    """Moves every trainable parameter of the adapters, as training would; the same each time."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lowrank.adapter_parameters(model):
            parameter.add_(size * torch.randn(parameter.shape, generator=draw).to(parameter))
    return model
