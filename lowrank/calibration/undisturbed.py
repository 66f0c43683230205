"""What calibration borrows of a model and gives back: modes, flags, random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside; modes, flags and random state as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    learning = [p for p in model.parameters() if p.requires_grad]
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past every hook
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in learning:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode
