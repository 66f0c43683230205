"""Warns of an output head with random weights that nothing would train or save."""

from __future__ import annotations

import warnings

from torch import nn

from lowrank.models.heads import output_heads
from lowrank.notices import LowrankWarning
from lowrank.plan import Plan


class FrozenHeadWarning(LowrankWarning):
    """An output head has random weights, and neither trains nor is adapted."""


def warn_of_new_heads(model: nn.Module, plan: Plan) -> None:
    """Says which heads of ``model`` were not in its checkpoint and are left as they are by ``plan``.

    Only where it can be told: transformers 5 marks the parameters that it read (``_is_hf_initialized``).
    """
    if not any(_was_read(parameter) for parameter in model.parameters()):
        return
    busy = {p.module for p in plan.adapted}
    new = []
    for path in sorted(output_heads(model)):
        own = list(model.get_submodule(path).parameters(recurse=False))
        trained = any(f"{path}.".startswith(f"{name}.") for name in plan.train)
        plain = all(type(p) is nn.Parameter and p.is_floating_point() for p in own)
        if own and plain and path not in busy and not trained and not any(map(_was_read, own)):
            new.append(path)
    if new:
        warnings.warn(
            f"{', '.join(new)}: not in the model's checkpoint, so its weights are random, and they stay "
            f"frozen; to train it and save it with the adapter: Policy(train={new})",
            FrozenHeadWarning,
            stacklevel=4,
        )


def _was_read(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))
