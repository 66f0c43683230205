"""The weight of a module as it is held: it is never computed here."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


def held_weight(module: nn.Module) -> Tensor | None:
    """The weight; where it is parametrized, what it is made from and has its shape.

    Reading such a weight computes it, which may change the module: spectral normalization does in training.
    """
    if is_parametrized(module, "weight"):
        made: Any = module.parametrizations["weight"]  # type: ignore[index]
        return max((*made.parameters(recurse=False), *made.buffers(recurse=False)), key=Tensor.numel)
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None
