"""The gradients of one optimizer step, from one batch or several, and what may be wrong with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.batches import Loss, model_device, scalar_loss, to_device


class NonFiniteLoss(ValueError):
    """The loss was NaN or infinite. Step and batch are named, and nothing was updated with it."""


class NonFiniteGradient(ValueError):
    """The loss was finite and its gradient was not. The step is named, and nothing was updated with it."""


@dataclass(frozen=True)
class Gradients:
    """Called with a step's batches, leaves in each parameter's ``.grad`` the gradient of their mean loss,
    clipped.

    A batch counts by ``weight``, the number of terms that its own mean is over, so that the result is the
    gradient of one large batch even where batches differ in size.
    """

    model: nn.Module
    parameters: Sequence[nn.Parameter]
    loss: Loss
    weight: Callable[[Any], float]
    clip: float | None
    autocast: torch.dtype | None

    def __call__(self, batches: Sequence[Any], step: int, place: int) -> tuple[float, float]:
        """The mean loss, and the norm of its gradient before clipping.

        ``place`` is the first batch's in its epoch, for messages. Waits for the device once.
        """
        weights = [float(self.weight(batch)) for batch in batches] if len(batches) > 1 else [1.0]
        shares = [weight / (sum(weights) or 1.0) for weight in weights]
        losses = torch.stack([self._backward(*pair) for pair in zip(batches, shares, strict=True)])
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        *values, size = torch.cat([losses, norm.to(losses).reshape(1)]).tolist()

        for at, value in enumerate(values, start=place):
            if not math.isfinite(value):
                raise NonFiniteLoss(f"the loss is {value} at step {step}, in batch {at} of its epoch")
        if not math.isfinite(size):
            raise NonFiniteGradient(
                f"the gradient's norm is {size} at step {step}, though the loss is {values}"
            )
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        return sum(value * share for value, share in zip(values, shares, strict=True)), size

    def _backward(self, batch: Any, share: float) -> Tensor:
        device = model_device(self.model)
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            loss = scalar_loss(self.loss, self.model, to_device(batch, device))
        if not loss.requires_grad:
            raise ValueError(
                "the loss depends on nothing that requires grad: does the model use what is to train?"
            )
        (loss * share).backward()
        return loss.detach().float()

    def unused(self) -> list[str]:
        """Which parameters have no gradient, by name; by shape where the model does not hold them."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        missing = [parameter for parameter in self.parameters if parameter.grad is None]
        return [names.get(parameter, f"one of shape {tuple(parameter.shape)}") for parameter in missing]
