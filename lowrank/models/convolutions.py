"""Convolutions as matrices ``(out, in · kernel)``: A is a convolution with ``rank`` channels, B a 1×1 one."""

from __future__ import annotations

from torch import nn

from lowrank.models.packing import packed

FORWARDS = {kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def convolution_problem(module: nn.Module) -> str:
    """Why ``module``, a convolution, cannot be adapted; empty where it can."""
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if module.groups > 1:
        return f"it has groups={module.groups}, and only groups=1 is supported"
    if type(module).forward not in FORWARDS:
        return f"{type(module).__name__} has a forward of its own"
    if packed(module.weight):
        return f"its weight is stored as {type(module.weight).__name__} of {module.weight.dtype}"
    return ""
