"""How many terms the mean of a loss is over, seen while it is computed. It looks into no model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lowrank.batches import IGNORED_LABEL


class TermCounter(TorchFunctionMode):
    """Inside, notes what each cross-entropy averages over: labels as the loss has shifted, flattened, packed
    or truncated them, without the ignored ones, each by the weight of its class where classes have one.

    It sees ``F.cross_entropy`` and ``F.nll_loss``, by which ``nn.CrossEntropyLoss`` and the models of
    transformers compute theirs, also in a compiled model. A loss with a kernel of its own is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.means: list[Tensor] = []
        self.parts: list[Tensor] = []  # of losses that are averaged by hand, possibly in pieces

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy or func is F.nll_loss:
            mean, terms = _terms(*args, **kwargs)
            (self.means if mean else self.parts).append(terms)
        return func(*args, **kwargs)

    @property
    def by_hand(self) -> bool:
        """Does the loss average by itself, over what can only be guessed?"""
        return bool(self.parts) and not self.means

    def total(self) -> Tensor | None:
        """The terms of the loss, on the device; None where none was seen.

        Of several means it is the largest: a language model's loss rather than an auxiliary one beside it.
        """
        if self.means:
            return _stacked(self.means).max()
        return _stacked(self.parts).sum() if self.parts else None


def _stacked(terms: list[Tensor]) -> Tensor:
    """In fp64 where the device has it: a float32 counts to 16 million."""
    dtype = torch.float64 if terms[0].device.type in ("cpu", "cuda") else torch.float32
    return torch.stack([each.to(terms[0].device, dtype) for each in terms])


def _terms(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = IGNORED_LABEL,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[bool, Tensor]:
    """Is it a mean, and over what sum of weights; the arguments are ``F.cross_entropy``'s."""
    mean = reduction == "mean" and size_average is not False and reduce is not False
    if target.is_floating_point():  # probabilities of the classes
        classes = input.select(1 if input.dim() > 1 else 0, 0)
        return mean, classes.detach().new_ones(()) * classes.numel()
    kept = target != ignore_index
    if weight is None:
        return mean, kept.sum()
    return mean, weight.detach()[target.clamp(0, len(weight) - 1)].mul(kept).sum()
