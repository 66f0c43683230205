"""Where a gradient is seen: at the output of a product. And a forward that is replaced for a while."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.calibration.meter import Meter
from lowrank.models.projections import Projection


def tapped(
    meter: Meter, name: str, held: Sequence[Projection], x: Tensor, output: Tensor, first: int = 0
) -> Tensor | None:
    """Lets ``meter`` see the gradient of ``output``; returns what is to take its place, or None.

    ``first`` is the row of ``held``'s tensor that the output's first column belongs to.
    """
    if not (meter.gradients.wants(held) and torch.is_grad_enabled()):
        return None
    replaced = None
    if not output.requires_grad or output._is_view():
        # The graph starts here: at a zero that requires grad, and not at the output itself, so that code
        # which then writes into the output still may. A hook on a view would be lost by such writing.
        anchor = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        output = replaced = output + anchor
    x, version = x.detach(), x._version

    def see(dy: Tensor) -> None:
        if x._version != version:
            raise ValueError(
                f"the input of {name} was overwritten after it was read, so its gradient is lost; "
                "let that operation make a new tensor, or leave the projection out with exclude="
            )
        meter.gradients.see(name, held, x, dy.detach(), first)

    output.register_hook(see)
    return replaced


def replace_forward(stack: ExitStack, module: nn.Module, forward: Any) -> None:
    """``module`` runs ``forward`` until ``stack`` closes."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    if before is None:
        stack.callback(module.__dict__.pop, "forward")
    else:
        stack.callback(module.__dict__.__setitem__, "forward", before)
