"""What makes a run smaller or faster and leaves what it computes alone: recomputed activations, compiling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from lowrank.processes import is_sharded


@contextmanager
def recomputing(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Inside, ``model`` computes activations again in backward instead of keeping them.

    Raises ValueError where the model does not offer it, as transformers' models do.
    """
    kinds = ("activation", "gradient")  # transformers' name from 5.23 on, and before
    kind = next((each for each in kinds if hasattr(model, f"{each}_checkpointing_enable")), "gradient")
    on, off = (getattr(model, f"{kind}_checkpointing_{what}", None) for what in ("enable", "disable"))
    if not enabled or any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        yield
        return
    if not callable(on) or not callable(off):
        raise ValueError(
            f"{type(model).__name__} has no gradient_checkpointing_enable: use torch.utils.checkpoint in its "
            "forward, and leave gradient_checkpointing=False"
        )
    on({"use_reentrant": False})
    try:
        yield
    finally:
        off()


def compiled(model: nn.Module, options: bool | Mapping[str, Any]) -> nn.Module:
    """``model``, or where ``options`` say so a compiled one with the same parameters."""
    if options is False:
        return model
    if any(map(is_sharded, model.parameters())):
        raise ValueError("compile=: a model that is sharded by FSDP2 cannot be compiled here; leave it out")
    return cast(nn.Module, torch.compile(model, **({} if options is True else options)))
