"""Learning rates that differ between the two factors of an adapter. They are groups for any optimizer."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lowrank.layers.adapter import Adapter


def lora_plus(model: nn.Module, lr: float, *, ratio: float = 16.0) -> list[dict[str, Any]]:
    """What requires grad in ``model`` in two groups: the factors B with ``ratio · lr``, all else with ``lr``.

    This is LoRA+ (Hayou et al. 2024, arXiv:2402.12354). Pass it as ``fit(parameters=...)``, or to an
    optimizer. Raises ValueError where no B is to be trained.
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is a positive number, not {value}")
    faster = {
        module.B for module in model.modules() if isinstance(module, Adapter) and module.B.requires_grad
    }
    if not faster:
        raise ValueError("the model has no factor B that requires grad: wrap it with wrap_model first")
    others = [p for p in model.parameters() if p.requires_grad and p not in faster]
    ordered = [p for p in model.parameters() if p in faster]
    groups = [{"params": others, "lr": lr}, {"params": ordered, "lr": lr * ratio}]
    return [group for group in groups if group["params"]]
